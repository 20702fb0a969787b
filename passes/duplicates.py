"""MergeDuplicates: equal calls on equal arguments are computed once; weights of the same name are one value."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.graph import Graph
from ..ir.ops import is_pure
from .ledger import PassReport, asks_first


@asks_first
def merge_duplicates(graph: Graph, report: PassReport) -> Graph:
    """Common subexpression elimination over values without effects."""
    seen: dict[Any, Node] = {}
    for node in list(graph.calls()):
        if not is_pure(node.target):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        if key in seen and report.allows(node.name):
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            report.fused.append(seen[key].name)
        else:
            seen[key] = node
    return graph


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value).__name__, value)
