"""Localize: from a graph that states what each rank holds to the graph that one rank runs."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.graph import Graph, flat_types
from ..ir.ops import is_collective, op_name
from ..ir.placement import OPTION, Placement, Routed, Shard, annotate, placements
from ..ir.placement_shapes import local_slice
from ..ir.types import TensorType
from .ledger import PassReport

_SHAPED = frozenset({"aten.reshape", "aten.expand"})


def localize(graph: Graph, report: PassReport) -> Graph:
    """Give every value the shape of a rank's part. The graph is the same for all ranks: the operators that cut and collect
    learn which one they are on when they are run."""
    if not any(kind.placement for node in graph.calls() for kind in flat_types(node.meta["type"])):
        return graph
    ranks = graph.options[OPTION]
    placed = placements(graph, ranks)
    slices = {
        node: local_slice(node, ranks)
        for node in graph.calls()
        if op_name(node.target) == "aten.slice.Tensor" and _along_cut(node, placed)
    }
    for node in graph.calls():
        found = placed[node]
        annotate(node, None)
        if isinstance(found, Shard):
            kinds = tuple(_part(kind, found.dim, ranks) for kind in flat_types(node.meta["type"]))
            node.meta["type"] = kinds if isinstance(node.meta["type"], tuple) else kinds[0]
            if op_name(node.target) in _SHAPED:
                shape: Any = list(kinds[0].shape)
                node.args = (node.args[0], shape, *node.args[2:])
            elif op_name(node.target) == "nn.absmax":
                parts: Any = kinds[0].shape[-1]
                node.args = (node.args[0], parts, *node.args[2:])
        if op_name(node.target) == "nn.grouped_linear":
            ids, full = placed[node.all_input_nodes[1]], (*node.args, *(None, False, None)[len(node.args) - 3 :])
            node.args = (*full[:5], ids.experts, *full[6:]) if isinstance(ids, Routed) else node.args
        if node in slices:
            node.args = slices[node]
        if is_collective(node.target):
            node.args = (*node.args, ranks)
            report.fused.append(node.name)
    return graph


def _along_cut(node: Node, placed: dict[Node, Placement]) -> bool:
    x = node.args[0]
    assert isinstance(x, Node)
    found, dim = placed[x], node.args[1]
    rank = len(flat_types(x.meta["type"])[0].shape)
    return isinstance(found, Shard) and isinstance(dim, int) and found.dim == dim % rank


def _part(kind: TensorType, dim: int, ranks: int) -> TensorType:
    size: Any = kind.shape[dim]
    return TensorType(kind.dtype, (*kind.shape[:dim], size // ranks, *kind.shape[dim + 1 :]))
