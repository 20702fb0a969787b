"""Kernel regions seen from outside: what they read, what they leave behind, what they write in place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ..ir.graph import Graph, Region, is_constant, node_inputs
from ..ir.ops import op_name


@dataclass
class RegionView:
    """One kernel region of a graph.

    ``inputs`` are the values from outside in the order of their first use, ``outputs`` those that others read.
    ``in_place`` maps a result that is an updated cache to the cache itself, which is among the inputs.
    """

    region: Region
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    in_place: dict[Node, Node] = field(default_factory=dict)


def regions_of(graph: Graph) -> list[RegionView]:
    """All kernel regions of a graph, in order."""
    views: dict[Region, RegionView] = {}
    for node in graph.calls():
        region = node.meta.get("region")
        if region is not None:
            views.setdefault(region, RegionView(region)).nodes.append(node)
    for view in views.values():
        inside = set(view.nodes)
        for node in view.nodes:
            for source in node_inputs([node.args, node.kwargs]):
                if source not in inside and source not in view.inputs:
                    view.inputs.append(source)
            if any(user not in inside for user in node.users):
                view.outputs.append(node)
            if op_name(node.target) == "nn.cache_write":
                cache = node.args[0]
                if isinstance(cache, Node):
                    view.in_place[node] = cache
    return list(views.values())


def loose_nodes(graph: Graph) -> list[Node]:
    """The values computed in each step outside of every kernel region."""
    return [
        node
        for node in graph.calls()
        if node.meta.get("region") is None and not is_constant(node) and str(node.target) != "cache"
    ]
