"""Check that a graph is well formed: names, types, order, kernel regions and the text round trip."""

from __future__ import annotations

from torch.fx import Node

from .dump import dump, line_of
from .errors import VerificationError
from .graph import Graph, Region, dims_of, flat_types, node_inputs
from .infer import TypeInferenceError, infer
from .parse import parse
from .placement import OPTION, VOCABULARY, Needs, Placement, check_result, placement_of
from .types import TensorType, Type, type_text

_LEAVES = frozenset({"weight", "cache", "const"})


def verify(graph: Graph) -> None:
    """Recompute every type and placement from the operators and compare; then check names, regions and the text round trip.

    Raises:
        VerificationError: says what is wrong and shows the line with its neighbours.
    """
    nodes = list(graph.nodes)
    seen: set[Node] = set()
    names: set[str] = set(graph.dims)
    finished: set[Region] = set()
    region: Region | None = None
    for node in nodes:
        for source in node_inputs([node.args, node.kwargs]):
            if source not in seen:
                raise _error(graph, node, f"{source.name} is used before it is defined")
        seen.add(node)
        if node.op == "output":
            continue
        if node.op not in ("placeholder", "call_function"):
            raise _error(graph, node, f"a graph has no {node.op} nodes")
        if node.name in names:
            raise _error(graph, node, f"the name {node.name} is taken")
        names.add(node.name)
        stated: Type | None = node.meta.get("type")
        if stated is None:
            raise _error(graph, node, "the value has no type")
        for name in dims_of([stated]):
            if name not in graph.dims:
                raise _error(graph, node, f"the dim {name} is not declared")
        inside = node.meta.get("region")
        if inside != region:
            if inside in finished:
                raise _error(graph, node, f'kernel "{inside.name}" is torn apart')
            if region is not None:
                finished.add(region)
            region = inside
        if node.op == "call_function" and str(node.target) not in _LEAVES:
            _check_type(graph, node, stated)
    _check_placements(graph)
    text = dump(graph)
    if dump(parse(text)) != text:
        raise VerificationError("the text of the graph does not survive a round trip through parse")


def _check_type(graph: Graph, node: Node, stated: Type) -> None:
    try:
        found = infer(node.target, node.args, dict(node.kwargs))
    except TypeInferenceError as error:
        raise _error(graph, node, f"the operator does not take these arguments: {error}") from error
    if not same_type(stated, found):
        raise _error(graph, node, f"stated type {type_text(stated)}, computed type {type_text(found)}")


def _check_placements(graph: Graph) -> None:
    """A graph that states placements states those of the table, for as many ranks as its option says."""
    stated = {node: flat_types(node.meta["type"]) for node in graph.nodes if node.op != "output"}
    if not any(kind.placement for kinds in stated.values() for kind in kinds):
        return
    ranks = graph.options.get(OPTION, 1)
    known: dict[Node, Placement] = {}
    for node in graph.nodes:
        try:
            if node.op == "output":
                check_result(node, known.__getitem__, VOCABULARY in graph.options)
                continue
            found = placement_of(node, known.__getitem__, ranks) if node.op == "call_function" else None
        except Needs as need:
            wanted = need.wanted or "whole"
            raise _error(graph, node, f"{need.operand.name} must be {wanted} there: {need}") from need
        known[node] = found
        text = "" if found is None else str(found)
        if any(kind.placement != text for kind in stated[node]):
            raise _error(graph, node, f"stated placement {stated[node]}, computed placement {text or 'whole'}")


def same_type(left: Type, right: Type) -> bool:
    """Whether two types agree in element type and shape (placements are checked by themselves)."""
    if isinstance(left, TensorType) and isinstance(right, TensorType):
        return left.dtype == right.dtype and left.shape == right.shape
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same_type, left, right))
    return False


def _error(graph: Graph, at: Node, why: str) -> VerificationError:
    return VerificationError(f"{graph.name}: {at.name}: {why}\n{excerpt(at)}")


def excerpt(at: Node, around: int = 2) -> str:
    """The line of a value with its neighbours, marked with an arrow."""
    before: list[Node] = []
    node = at.prev
    while len(before) < around and node.op == "call_function":
        before.insert(0, node)
        node = node.prev
    after: list[Node] = []
    node = at.next
    while len(after) < around and node.op == "call_function":
        after.append(node)
        node = node.next
    shown = []
    for node in [*before, at, *after]:
        if node.op == "call_function" and "type" in node.meta:
            text = line_of(node)
        else:
            text = f"{node.name} = {node.target}{node.args}" if node.op == "call_function" else f"{node.op} {node.name}"
        shown.append(("--> " if node is at else "    ") + text)
    return "\n".join(shown)
