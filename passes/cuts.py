"""Small graphs cut out of large ones, with inputs in place of what lies outside.

``pair`` cuts the same value out of the graph before and after a pass, down to values that both have. ``ball`` cuts out
what lies around a value, for a reproduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ir.dump import call_text
from ..ir.graph import Graph, dims_of, flat_types, is_constant
from ..ir.types import TensorType
from .comparison import is_comparable

_LARGEST = 150  # nodes of a pair's half
_ROUNDS = 8


@dataclass
class Side:
    """One of two graphs: its values by name, and for each (in the first of them) what it depends on, as bits."""

    graph: Graph
    named: dict[str, Node]
    ancestors: dict[Node, int]
    bit: dict[Node, int]

    @staticmethod
    def of(graph: Graph) -> Side:
        """Look at a graph."""
        nodes = [node for node in graph.nodes if node.op != "output"]
        bit = {node: 1 << place for place, node in enumerate(nodes)}
        ancestors: dict[Node, int] = {}
        for node in nodes:
            found = 0
            for source in node.all_input_nodes:
                found |= ancestors[source] | bit[source]
            ancestors[node] = found
        return Side(graph, {node.name: node for node in nodes}, ancestors, bit)


def changed(before: Side, after: Side) -> Iterator[str]:
    """The names of values that both graphs have and that ``after`` computes in another way, or from other operands."""
    for node in after.graph.calls():
        old = before.named.get(node.name)
        if old is None or old.op != "call_function" or not _alike(old, node):
            continue
        if call_text(old) != call_text(node) or not all(map(_alike_types, old.all_input_nodes, node.all_input_nodes)):
            yield node.name


def _alike(left: Node, right: Node) -> bool:
    """Whether two nodes may be the same value: one tensor of floats in the same shape, up to dims of 1."""
    return is_comparable(left) and is_comparable(right) and _alike_types(left, right)


def _alike_types(left: Node, right: Node) -> bool:
    pairs = zip(flat_types(left.meta["type"]), flat_types(right.meta["type"]))
    return all(_squeezed(old) == _squeezed(new) for old, new in pairs)


def _squeezed(kind: TensorType) -> tuple[object, ...]:
    return (kind.dtype, *(size for size in kind.shape if size != 1))


def pair(before: Side, after: Side, name: str, shared: Set[str]) -> tuple[Graph, Graph] | None:
    """The value of that name as a graph of its own, before and after, on the same inputs; nothing if there is no small one.

    The inputs are the nearest values that both graphs have such that everything the value depends on before passes
    through them, and none of them depends on another. ``shared`` are the ``shared_values`` of the two.
    """
    opened: set[str] = set()
    for _ in range(_ROUNDS):
        new = _cone(after.named, name, shared - opened)
        old = None if new is None else _cone(before.named, name, new.inputs)
        if new is None or old is None:
            return None
        inner = {item for item in new.inputs if before.named[item].op != "placeholder"}
        if old.inputs <= new.inputs:
            reached = 0
            for item in new.inputs:
                reached |= before.bit[before.named[item]]
            inner = {item for item in inner if before.ancestors[before.named[item]] & reached}
        if not inner:
            return _graph(before.graph, old, [name]), _graph(after.graph, new, [name])
        opened |= inner
    return None


@dataclass(frozen=True)
class _Cone:
    """Values to be computed, and the names of those that are given."""

    nodes: frozenset[Node]
    inputs: frozenset[str]


def _cone(named: Mapping[str, Node], name: str, given: Set[str]) -> _Cone | None:
    """What a value is computed from, down to values that are given; nothing if it is too much."""
    nodes: set[Node] = set()
    inputs: set[str] = set()
    stack = [named[name]]
    while stack:
        node = stack.pop()
        if node in nodes or node.name in inputs:
            continue
        if node.op == "placeholder" or (nodes and node.name in given):
            inputs.add(node.name)
            continue
        nodes.add(node)
        if len(nodes) > _LARGEST:
            return None
        stack += node.all_input_nodes
    return _Cone(frozenset(nodes), frozenset(inputs))


def shared_values(before: Side, after: Side) -> frozenset[str]:
    """The names of values that stand for the same before and after, and are no constants."""
    return frozenset(
        name
        for name, node in after.named.items()
        if name in before.named and not is_constant(node) and _alike(before.named[name], node)
    )


def ball(graph: Graph, name: str, radius: int) -> Graph | None:
    """The values at most ``radius`` steps away from the one of that name, as a graph of its own; nothing if it has no result.

    What they read from outside becomes inputs, but weights, integers and truth values are computed inside. The results
    are the values that others read outside.
    """
    start = next((node for node in graph.calls() if node.name == name), None)
    if start is None:
        return None
    inside, edge = {start}, [start]
    for _ in range(radius):
        near = [item for node in edge for item in (*node.all_input_nodes, *node.users)]
        edge = [item for item in near if item not in inside and item.op == "call_function" and not is_constant(item)]
        inside |= set(edge)
    inputs: set[str] = set()
    stack = [source for node in inside for source in node.all_input_nodes if source not in inside]
    needed = set(inside)
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or (is_comparable(node) and not is_constant(node)):
            inputs.add(node.name)
        elif node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    inputs -= {node.name for node in needed}
    results = [node.name for node in graph.calls() if node in inside and is_comparable(node) and _is_read(node, inside)]
    if not results:
        return None
    return _graph(graph, _Cone(frozenset(needed), frozenset(inputs)), results)


def narrowed(graph: Graph, result: str, given: Set[str]) -> Graph | None:
    """The part of a graph that makes one of its values, with others given as inputs; nothing if there is no such part."""
    cone = _cone({node.name: node for node in graph.nodes}, result, given)
    return None if cone is None else _graph(graph, cone, [result])


def _is_read(node: Node, inside: set[Node]) -> bool:
    return not node.users or any(user not in inside for user in node.users)


def _graph(graph: Graph, part: _Cone, results: Sequence[str]) -> Graph:
    small = Graph(graph.name, options=graph.options)
    known: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.name in part.inputs:
            known[node] = small.placeholder(node.name)
            known[node].name = node.name
            known[node].meta = {"type": node.meta["type"]}
    for node in graph.nodes:
        if node in part.nodes:
            made = small.node_copy(node, lambda item: known[item])
            made.name = node.name
            made.meta = {key: item for key, item in node.meta.items() if key != "region"}
            known[node] = made
    outputs = [node for old, node in known.items() if old.name in results]
    small.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    names = dims_of(node.meta["type"] for node in small.nodes if node.op != "output")
    small.dims = {name: bounds for name, bounds in graph.dims.items() if name in names}
    return small


def fingerprint(graphs: Sequence[Graph]) -> tuple[object, ...]:
    """Equal for cuts that differ in names alone, as those of equal layers do."""
    numbers: dict[str, int] = {}

    def numbered(value: Any) -> object:
        if isinstance(value, Node):
            return ("value", numbers.setdefault(value.name, len(numbers)))
        if isinstance(value, (list, tuple)):
            return tuple(map(numbered, value))
        return (type(value).__name__, str(value))

    found: list[object] = []
    for graph in graphs:
        for node in graph.nodes:
            args = node.args
            if str(node.target) == "weight":
                args = (numbers.setdefault(f"weight {args[0]}", len(numbers)),)
            target = "" if node.op == "placeholder" else str(node.target)
            named = tuple((name, numbered(item)) for name, item in node.kwargs.items())
            found.append((numbered(node), target, numbered(args), named, str(node.meta.get("type"))))
    return tuple(found)
