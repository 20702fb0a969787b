"""One spelling for each ATen call: positional arguments, no defaults, dims counted from the right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from .ops import aten
from .sizes import Unstatable
from .types import Dim, TensorType

IDENTITIES = frozenset({"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "detach_", "lift"})
RESHAPES = {
    "view": "reshape",
    "reshape": "reshape",
    "_unsafe_view": "reshape",
    "flatten": "reshape",
    "unflatten": "reshape",
    "view_as": "reshape",
    "expand": "expand",
    "expand_as": "expand",
}
SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})

# Other names of the same operators.
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
}

# Where and how a result is stored or computed, not what it is.
_PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "cudnn_enable"})
_DIM_NAMES = frozenset({"dim", "dims", "dim0", "dim1"})
_GROWS = frozenset({"unsqueeze", "stack"})  # their dim counts in the result, which has one more


def normalize(target: Any, args: list[Any], kwargs: dict[str, Any], rank: int) -> tuple[Any, list[Any], dict[str, Any]]:
    """The call with the arguments of its schema in order, defaults cut off, dims negative, placement left out.

    ``rank`` is the rank of the first tensor argument.
    """
    packet = target._schema.name.rpartition("::")[2]
    if packet in _ALIASES:
        target = getattr(getattr(torch.ops.aten, _ALIASES[packet]), target._overloadname)
        packet = _ALIASES[packet]
    if target._overloadname == "other" and packet in ("min", "max"):  # two tensors: another function of the same name
        return aten(f"{packet}imum"), args, kwargs
    if packet in ("t", "numpy_T"):
        return aten("transpose.int"), [args[0], -2, -1], {}
    schema = target._schema.arguments
    values: list[Any] = []
    named: dict[str, Any] = {}
    for index, argument in enumerate(schema):
        if index < len(args):
            value = args[index]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value if argument.has_default_value() else None
        if argument.name in _PLACEMENT:
            continue
        if argument.name in _DIM_NAMES:
            value = _negative(value, rank + (1 if packet in _GROWS else 0))
        if packet == "slice" and argument.name in ("start", "end"):
            value = _bound(value, argument.name, args, rank)
        if argument.kwarg_only:
            if not argument.has_default_value() or value != argument.default_value:
                named[argument.name] = value
        else:
            values.append(value)
    if packet == "permute" or (packet == "transpose" and rank):
        return target, values, named
    positional = [argument for argument in schema if not argument.kwarg_only and argument.name not in _PLACEMENT]
    while values and positional[len(values) - 1].has_default_value():
        default = positional[len(values) - 1].default_value
        if isinstance(values[-1], (Node, Dim, list)) or values[-1] != default:
            break
        values.pop()
    return target, values, named


def parts_of(packet: str, args: list[Any], kinds: tuple[TensorType, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The calls ``(target, args)`` that make the parts of a split: a slice each, or a select each for ``unbind``.

    ``kinds`` are the types of the parts.

    Raises:
        Unstatable: the row of tokens is cut.
    """
    rank = args[0].meta["type"].rank
    dim = (args[1:] or [0])[0] if packet == "unbind" else (args[2:] or [0])[0]
    axis = dim - rank if dim >= 0 else dim
    start: Any = 0
    for index, kind in enumerate(kinds):
        if packet == "unbind":
            yield aten("select.int"), (args[0], axis, index)
            continue
        width = kind.shape[axis]
        if isinstance(width, Dim) or isinstance(start, Dim):
            raise Unstatable(f"it cuts the row of tokens into parts ({width})")
        yield aten("slice.Tensor"), (args[0], axis, start, start + width)
        start += width


def _negative(value: Any, rank: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value - rank if value >= 0 else value
    if isinstance(value, list):
        return [_negative(item, rank) for item in value]
    return value


def _bound(value: Any, name: str, args: list[Any], rank: int) -> Any:
    """A slice bound within the size of its dim, negative bounds resolved."""
    kind: TensorType = args[0].meta["type"]
    dim = args[1] if len(args) > 1 else 0
    size = kind.shape[dim if dim < 0 else dim - rank]
    if value is None:
        return 0 if name == "start" else size
    if isinstance(value, int) and isinstance(size, int):
        return max(0, min(value + size if value < 0 else value, size))
    if isinstance(value, int) and name == "end" and value > 1 << 40:
        return size
    return value
