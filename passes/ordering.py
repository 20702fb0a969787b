"""Order a graph so that the nodes of each kernel region stand together."""

from __future__ import annotations

import networkx as nx
from torch.fx import Node

from ..ir.graph import Graph, Region, is_constant


def make_contiguous(graph: Graph) -> None:
    """Reorder the nodes in place, keeping their order as far as the regions allow.

    A region through which a value would have to pass twice (out and in again) is dissolved into single nodes.
    """
    while True:
        units, members = _units(graph)
        condensed = nx.DiGraph()
        condensed.add_nodes_from(range(len(members)))
        for node, unit in units.items():
            for source in node.all_input_nodes:
                if units[source] != unit:
                    condensed.add_edge(units[source], unit)
        try:
            order = list(nx.lexicographical_topological_sort(condensed))
            break
        except nx.NetworkXUnfeasible:
            for unit, _ in nx.find_cycle(condensed):
                if len(members[unit]) > 1:
                    for node in members[unit]:
                        node.meta.pop("region", None)
    place = graph._root if not graph.inputs() else graph.inputs()[-1]
    for unit in order:
        for node in members[unit]:
            if node.op == "call_function":
                place.append(node)
                place = node


def _units(graph: Graph) -> tuple[dict[Node, int], list[list[Node]]]:
    """Each region is one unit, every other node one of its own. Units are numbered so that weights come right before
    the first unit that reads them."""
    keys: dict[object, int] = {}
    units: dict[Node, int] = {}
    members: list[list[Node]] = []

    def add(node: Node) -> None:
        if node in units:
            return
        region: Region | None = node.meta.get("region")
        key: object = region if region is not None else node
        if key not in keys:
            keys[key] = len(members)
            members.append([])
        units[node] = keys[key]
        members[keys[key]].append(node)

    last_of = {node.meta["region"]: node for node in graph.calls() if node.meta.get("region") is not None}
    nodes_of: dict[Region, list[Node]] = {}
    for node in graph.calls():
        if node.meta.get("region") is not None:
            nodes_of.setdefault(node.meta["region"], []).append(node)
    deferred = {node for node in graph.calls() if is_constant(node) or str(node.target) == "cache"}

    def bring(node: Node) -> None:
        """Add the weights and caches that a node reads."""
        for source in node.all_input_nodes:
            if source in deferred and source not in units:
                bring(source)
                add(source)

    for node in graph.nodes:
        region = node.meta.get("region")
        if node in deferred:
            continue
        if region is not None and last_of[region] is not node:
            continue
        for item in nodes_of[region] if region is not None else [node]:
            bring(item)
        for item in nodes_of[region] if region is not None else [node]:
            add(item)
    for node in deferred:
        add(node)
    return units, members
