"""Twins of a graph that its numbers are compared on: all floats in fp32, and windows shorter than short sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .graph import Graph, flat_types
from .ops import op_name
from .types import TensorType, Type

_NARROW = frozenset({"bf16", "f16"})
# Where the window stands among the arguments.
_WINDOW = {"nn.attention": 6, "nn.paged_attention": 9}
_SHORTEST = 5


def widened(graph: Graph) -> Graph:
    """The graph with all narrow floats made fp32; what rounding hides in bf16 shows there."""
    wide = graph.copy()
    for node in wide.nodes:
        if "type" in node.meta:
            node.meta["type"] = _wide_type(node.meta["type"])
        if node.op == "call_function":
            node.args = _wide_value(node.args)
            node.kwargs = {name: _wide_value(item) for name, item in node.kwargs.items()}
    return wide


def _wide_type(kind: Type) -> Type:
    if isinstance(kind, TensorType):
        return kind.with_dtype("f32") if kind.dtype in _NARROW else kind
    return tuple(item.with_dtype("f32") if item.dtype in _NARROW else item for item in kind)


def _wide_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_wide_value(item) for item in value)
    return torch.float32 if value in (torch.bfloat16, torch.float16) else value


def is_narrow(graph: Graph) -> bool:
    """Whether a weight or an input is in a narrow float type."""
    leaves = (node for node in graph.nodes if node.op == "placeholder" or str(node.target) == "weight")
    return any(kind.dtype in _NARROW for node in leaves for kind in flat_types(node.meta["type"]))


def windows_of(graph: Graph) -> tuple[int, ...]:
    """The distinct windows of the attention layers, smallest first."""
    return tuple(sorted({node.args[place] for node, place in _windowed(graph)}))


def shortened(graph: Graph, windows: Sequence[int]) -> Graph:
    """The graph with its windows shortened so that a few tokens more than ``_SHORTEST`` reach beyond them.

    ``windows`` are those of the graph that it came from. Each window is shortened by as much as the nearest of them,
    so one that is off by one stays off by one. Windows that are short already stay.
    """
    found = graph.copy()
    for node, place in _windowed(found):
        window = node.args[place]
        rank, nearest = min(enumerate(windows), key=lambda item: abs(item[1] - window), default=(0, window))
        wanted = min(nearest, _SHORTEST + 2 * rank)
        node.update_arg(place, max(1, window - nearest + wanted))
    return found


def _windowed(graph: Graph) -> list[tuple[Any, int]]:
    """The attention nodes that have a window, and where it stands."""
    found = []
    for node in graph.calls():
        place = _WINDOW.get(op_name(node.target))
        if place is not None and len(node.args) > place and node.args[place]:
            found.append((node, place))
    return found
