"""Cut the region of a matmul in three: the rows it reads, the product, and the work on its result."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from ..ir.graph import Graph, dims_of, type_of
from ..ir.types import Size
from .rows import leading, value_written


def rows_part(graph: Graph, anchor: Node) -> Graph | None:
    """The work before the product as a graph of its own, which returns the product's rows; nothing if there is none."""
    before = [node for node in graph.calls() if node < anchor]
    return part(graph, before, [anchor.args[0]], f"{graph.name}_rows") if before else None  # type: ignore[list-item]


def without_rows(graph: Graph, anchor: Node) -> Graph:
    """The region without the work before the product, whose rows become an input."""
    after = [node for node in graph.calls() if node >= anchor]
    return part(graph, after, _results(graph), graph.name)


def product_part(graph: Graph, anchor: Node) -> Graph:
    """The region up to the product, without the work on its result."""
    return part(graph, [node for node in graph.calls() if node <= anchor], [anchor], graph.name)


def finish_parts(graph: Graph, anchor: Node) -> list[Graph]:
    """The work on the product, one graph for the results of each shape of rows; the product itself is none of them."""
    results = [node for node in _results(graph) if node is not anchor]
    after = [node for node in graph.calls() if node > anchor]
    groups: dict[tuple[Size, ...], list[Node]] = {}
    for node in results:
        groups.setdefault(leading(type_of(value_written(node)).shape), []).append(node)
    parts = []
    for number, wanted in enumerate(groups.values(), start=1):
        needed = set(wanted)
        for node in reversed(after):
            if node in needed:
                needed |= set(node.all_input_nodes)
        name = f"{graph.name}_finish" + (f"_{number}" if len(groups) > 1 else "")
        parts.append(part(graph, [node for node in after if node in needed], wanted, name))
    return parts


def part(graph: Graph, nodes: Iterable[Node], results: list[Node], name: str) -> Graph:
    """Some nodes of a graph as a graph; what they read from outside becomes an input of the same name."""
    made, known = Graph(name), dict[Node, Node]()
    kept = list(nodes)
    inside = set(kept)
    for node in dict.fromkeys(source for item in kept for source in item.all_input_nodes):
        if node not in inside:
            known[node] = made.placeholder(node.name)
    for node in kept:
        known[node] = made.node_copy(node, lambda item: known[item])
    for node, twin in known.items():
        twin.name = node.name
        twin.meta = {"type": node.meta["type"]}
    made.output([known[node] for node in results])
    names = dims_of(node.meta["type"] for node in made.nodes if node.op != "output")
    made.dims = {dim: bounds for dim, bounds in graph.dims.items() if dim in names}
    return made


def _results(graph: Graph) -> list[Node]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]
