"""Projections on the CPU with weights packed for its vector units (oneDNN), which small batches read much faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.loop import Loop
from ..ir.ops import op_name

Linear = Callable[[Tensor], Tensor]
T = TypeVar("T")

# Below this many elements a plain call costs less than the way to the packed one.
_SMALLEST = 1 << 16


def pack_linears(loop: Loop, constants: dict[Node, list[Tensor]]) -> tuple[dict[Node, list[Linear]], int]:
    """Projections of fp32 rows on the CPU by node, for each of its times (see ``at``), and the bytes of the packed weights.

    Weights that nothing else reads are taken out of ``constants``, which are by node and time, too.
    """
    linears: dict[Node, list[Linear]] = {}
    packed: dict[Node, list[Tensor]] = {}
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return {}, 0
    for node in loop.graph.calls():
        if op_name(node.target) != "aten.linear":
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight, Node)
        if isinstance(bias, Node) and bias not in constants:
            continue  # it is computed in the step
        if weight not in packed:
            values = constants.get(weight)
            if values is None or not _is_packed(values[0]):
                continue
            packed[weight] = [torch.ops.mkldnn._reorder_linear_weight(value) for value in values]
        biases: Sequence[Tensor | None] = constants[bias] if isinstance(bias, Node) else [None]
        count = max(len(packed[weight]), len(biases))
        linears[node] = [_linear(at(packed[weight], time), at(biases, time)) for time in range(count)]
    for weight in packed:
        if all(user in linears and user.all_input_nodes.count(weight) == 1 for user in weight.users):
            del constants[weight]
    return linears, sum(4 * weight.numel() for weights in packed.values() for weight in weights)


def at(values: Sequence[T], time: int) -> T:
    """The value of a time counted from 0; a single one is that of all times."""
    return values[time] if len(values) > 1 else values[0]


def _is_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    def linear(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    return linear
