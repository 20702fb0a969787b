"""How the columns of a matmul are cut into tiles: sections with an epilogue of their own, and lanes within them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name


@dataclass(frozen=True)
class Section:
    """Columns of the result with an epilogue of their own.

    ``lanes`` are the values (slices, or the result itself) that are combined with each other, each beginning at the
    column ``starts``; all have ``width`` columns. ``outputs`` are what the epilogue leaves behind.
    """

    lanes: tuple[Node, ...]
    starts: tuple[int, ...]
    width: int
    outputs: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """How the columns of a matmul are cut into tiles. ``head_dim`` is set if a tile is one head."""

    anchor: Node
    sections: tuple[Section, ...]
    head_dim: int | None


def plan(graph: Graph) -> Plan:
    """Find the anchor and the sections of a region."""
    anchor = next(node for node in graph.calls() if op_name(node.target) == "aten.linear")
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    slices = [
        node for node in anchor.users if op_name(node.target) == "aten.slice.Tensor" and node.op == "call_function"
    ]
    if not slices or anchor in results:
        slices = []
    roots = slices or [anchor]
    reach = {root: _descendants(root) for root in roots}
    groups: list[list[Node]] = []
    for root in sorted(roots, key=lambda node: int(str(node.args[2])) if slices else 0):
        partner = next((group for group in groups if any(reach[root] & reach[other] for other in group)), None)
        if partner is None:
            groups.append([root])
        else:
            partner.append(root)
    sections = []
    for group in groups:
        width = type_of(group[0]).shape[-1]
        assert isinstance(width, int)
        own = set().union(*(reach[root] for root in group)) | set(group)
        starts = tuple(int(str(root.args[2])) if slices else 0 for root in group)
        sections.append(Section(tuple(group), starts, width, tuple(node for node in results if node in own)))
    heads = {
        type_of(node).shape[-1]
        for root in roots
        for node in reach[root]
        if op_name(node.target) == "aten.reshape" and type_of(node).rank == 3
    }
    head_dim = next(iter(heads), None)
    return Plan(anchor, tuple(sections), head_dim if isinstance(head_dim, int) else None)


def _descendants(root: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [user for user in root.users if user.op == "call_function"]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [user for user in node.users if user.op == "call_function"]
    return found
