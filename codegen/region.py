"""Kernel regions: seen from outside in a graph, and cut out as small graphs of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch.fx import Node

from ..ir.graph import Graph, Region, dims_of, is_constant, node_inputs
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


def cut_out(graph: Graph, view: RegionView) -> Graph:
    """The region as a graph whose inputs are the region's, with names that do not tell the layer.

    Regions of different layers that do the same become equal graphs, to the letter.
    """
    small = Graph(view.region.name)
    known: dict[Node, Node] = {}
    used: set[str] = set()
    inside = set(view.nodes)

    def name_for(node: Node) -> str:
        base = re.sub(r"_\d+$", "", re.sub(r"^l\d+_", "", node.name)) or node.name
        if str(node.target) == "cache":
            base = f"{node.args[0]}_cache"
        elif node.op == "call_function" and node not in inside and not is_constant(node):
            # What earlier kernels computed: the first layer reads other values than the others.
            tables = [user for user in node.users if user in inside and op_name(user.target) == "nn.rope"]
            base = "x" if not tables or tables[0].args[0] is node else "cos" if tables[0].args[1] is node else "sin"
        name, count = base, 2
        while name in used:
            name, count = f"{base}_{count}", count + 1
        used.add(name)
        return name

    for node in view.inputs:
        made = small.placeholder(node.name)
        made.name = name_for(node)
        made.meta["type"] = node.meta["type"]
        known[node] = made
    for node in view.nodes:
        made = small.node_copy(node, lambda item: known[item])
        made.name = name_for(node)
        made.meta = {"type": node.meta["type"]}
        known[node] = made
    small.output([known[node] for node in view.outputs])
    names = dims_of(node.meta["type"] for node in small.nodes if node.op != "output")
    small.dims = {name: bounds for name, bounds in graph.dims.items() if name in names}
    return small
