"""Writes into a part of a tensor, as values: what is kept of the old value and what is new, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from .graph import type_of
from .ops import aten, op_name
from .types import Dim, Size

# ``copy`` and the ``scatter`` forms are what in-place writes to views become when a trace is made functional.
WRITES = frozenset({"copy", "slice_scatter", "select_scatter"})

Emit = Callable[[Any, tuple[Any, ...]], Node]


def written(packet: str, args: list[Any], emit: Emit) -> Node:
    """The value after a write: the source itself, or a ``cat`` of it with the parts of the base that it leaves.

    ``emit(target, args)`` adds a call to the graph. A base that ends up overwritten everywhere has no reader left.
    """
    base, source = args[0], args[1]
    kind = type_of(base)
    if packet == "copy":
        return _fitted(source, kind.shape, kind.torch_dtype, emit)
    dim = args[2] if len(args) > 2 and args[2] is not None else 0
    dim = dim - kind.rank if dim >= 0 else dim
    size = kind.shape[dim]
    if packet == "select_scatter":
        start = args[3] + size if isinstance(size, int) and args[3] < 0 else args[3]
        source, end, step = emit(aten("unsqueeze"), (source, dim)), start + 1, 1
    else:
        start = _bound(args[3] if len(args) > 3 else None, size, 0)
        end = _bound(args[4] if len(args) > 4 else None, size, size)
        step = args[5] if len(args) > 5 else 1
    if (start, end, step) == (0, size, 1):
        return _fitted(source, kind.shape, kind.torch_dtype, emit)
    if step != 1:
        return emit(aten("slice_scatter"), (base, source, dim, start, end, step))
    source = _fitted(source, None, kind.torch_dtype, emit)
    pieces = [_part(base, dim, 0, start, emit), source, _part(base, dim, end, size, emit)]
    return emit(
        aten("cat"), ([item for piece in pieces for item in (piece if isinstance(piece, list) else [piece])], dim)
    )


def _bound(value: Any, size: Size, default: Size) -> Any:
    if value is None:
        return default
    if isinstance(value, int) and isinstance(size, int):
        return max(0, min(value + size if value < 0 else value, size))
    return size if isinstance(value, int) and value > 1 << 40 else value


def _fitted(value: Node, shape: tuple[Size, ...] | None, dtype: Any, emit: Emit) -> Node:
    if shape is not None and type_of(value).shape != shape:
        value = emit(aten("expand"), (value, list(shape)))
    return value if type_of(value).torch_dtype == dtype else emit(aten("to.dtype"), (value, dtype))


def _part(base: Node, dim: int, start: Size, end: Size, emit: Emit) -> list[Node]:
    """``base[start:end]`` along ``dim`` as values to concatenate; of a ``cat`` its own operands, where they fit."""
    if start == end:
        return []
    if base.op == "call_function" and op_name(base.target) == "aten.cat" and base.args[1:] == (dim,):
        found, place = [], 0
        for item in base.args[0]:  # type: ignore[union-attr]
            width = type_of(item).shape[dim]  # type: ignore[arg-type]
            if isinstance(width, Dim) or isinstance(start, Dim) or isinstance(end, Dim):
                break
            if start <= place and place + width <= end:
                found.append(item)
            elif place < end and start < place + width:
                break
            place += width
        else:
            return found  # type: ignore[return-value]
    return [emit(aten("slice.Tensor"), (base, dim, start, end))]
