"""Coordinates through views: where in the source an element of a slice, transpose or reshape lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.ops import op_name
from ..ir.types import Size

TILE = 4096
"""Elements of a tile that keep a program of four warps well within its registers."""


def padded_width(width: int) -> int:
    """The power of two that a row of this width is padded to."""
    return 1 << (width - 1).bit_length() if width > 1 else 1


def strides_of(shape: Sequence[Size]) -> list[int]:
    """Element strides of a contiguous tensor; only the outermost size may be dynamic."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * size if isinstance(size, int) else 0
    return strides


def flat_index(coords: Sequence[str], shape: Sequence[Size]) -> str:
    """The offset of an element in a contiguous tensor."""
    terms = []
    for coord, stride, size in zip(coords, strides_of(shape), shape):
        if coord == "0" or size == 1:
            continue
        terms.append(coord if stride == 1 else f"{coord} * {stride}")
    return " + ".join(terms) or "0"


def through_view(node: Node, coords: tuple[str, ...]) -> tuple[str, ...] | None:
    """The coordinates on the operand of a view; nothing if the operator is no view."""
    name = op_name(node.target)
    if name not in _VIEWS:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    return _VIEWS[name](node, type_of(source).shape, type_of(node).shape, coords)


def _slice(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    start, step = node.args[2], node.args[4] if len(node.args) > 4 else 1
    column = coords[-1] if step == 1 else f"{coords[-1]} * {step}"
    return (*coords[:-1], f"({column} + {start})" if start else (column if step == 1 else f"({column})"))


def _unsqueeze(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    place = len(shape) + int(str(node.args[1]))
    return coords[:place] + coords[place + 1 :]


def _expand(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    kept = coords[len(shape) - len(source) :]
    return tuple("0" if size == 1 else coord for size, coord in zip(source, kept))


def _transpose(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    left, right = int(str(node.args[1])), int(str(node.args[2]))
    swapped = list(coords)
    swapped[left], swapped[right] = swapped[right], swapped[left]
    return tuple(swapped)


def _select(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    place = len(source) + int(str(node.args[1]))
    index, size = int(str(node.args[2])), source[place]
    if index < 0 and isinstance(size, int):
        index += size
    return (*coords[:place], str(index), *coords[place:])


def _reshape(node: Node, source: Sequence[Size], shape: Sequence[Size], coords: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = ["0"] * len(source)
    for dims, places in _blocks(source, shape):
        flat = flat_index(coords[places], shape[places])
        for place in range(dims.stop - 1, dims.start - 1, -1):
            size = source[place]
            if place == dims.start:
                found[place] = flat if flat.isidentifier() or flat.isdigit() else f"({flat})"
            elif size != 1:
                found[place] = f"(({flat}) % {size})"
                flat = f"({flat}) // {size}"
    return tuple(found)


def _blocks(source: Sequence[Size], shape: Sequence[Size]) -> Iterator[tuple[slice, slice]]:
    """Runs of dims of the one shape that hold as many elements as a run of the other, the last first.

    Only within them does a reshape mix coordinates. Dims of size one may be left over.
    """
    last, end = len(source), len(shape)
    while last and end:
        first, begin = last - 1, end - 1
        while source[first:last] != shape[begin:end]:
            here, there = _elements(source[first:last]), _elements(shape[begin:end])
            if here == there != 0:
                break
            if here and there and here < there and first:
                first -= 1
            elif here and there and there < here and begin:
                begin -= 1
            else:
                first = begin = 0
                break
        yield slice(first, last), slice(begin, end)
        last, end = first, begin


def _elements(sizes: Sequence[Size]) -> int:
    """Their product; zero if one is dynamic."""
    return prod(size if isinstance(size, int) else 0 for size in sizes)


_VIEWS = {
    "aten.slice.Tensor": _slice,
    "aten.unsqueeze": _unsqueeze,
    "aten.expand": _expand,
    "aten.transpose.int": _transpose,
    "aten.select.int": _select,
    "aten.reshape": _reshape,
}
