"""Projections on the CPU with weights packed for its vector units (oneDNN), which small batches read much faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.graph import Graph
from ..ir.ops import op_name

Linear = Callable[[Tensor], Tensor]

# Below this many elements a plain call costs less than the way to the packed one.
_SMALLEST = 1 << 16


def pack_linears(graph: Graph, constants: dict[Node, Tensor]) -> tuple[dict[Node, Linear], int]:
    """Projections of fp32 rows on the CPU by their node, and the bytes of their packed weights.

    Weights that nothing else reads are taken out of ``constants``.
    """
    linears: dict[Node, Linear] = {}
    packed: dict[Node, Tensor] = {}
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return {}, 0
    for node in graph.calls():
        if op_name(node.target) != "aten.linear":
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight, Node)
        if isinstance(bias, Node) and bias not in constants:
            continue  # it is computed in the step
        if weight not in packed:
            value = constants.get(weight)
            if value is None or value.device.type != "cpu" or value.dtype != torch.float32 or value.numel() < _SMALLEST:
                continue
            packed[weight] = torch.ops.mkldnn._reorder_linear_weight(value)
        linears[node] = _linear(packed[weight], constants[bias] if isinstance(bias, Node) else None)
    for weight in packed:
        if all(user in linears and user.all_input_nodes.count(weight) == 1 for user in weight.users):
            del constants[weight]
    return linears, sum(4 * weight.numel() for weight in packed.values())


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    def linear(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    return linear
