"""How the columns of a matmul are cut into tiles: sections with an epilogue of their own, and lanes within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import PROJECTIONS, op_name


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


Order = Literal["halves", "neighbours"]


@dataclass(frozen=True)
class Plan:
    """How the columns of a matmul are cut into tiles. ``head_dim`` is set if a tile lies within one head.

    ``order`` says which columns of a head make a tile, so that it holds both values of each pair that is rotated:
    ``"neighbours"`` follow each other; ``"halves"`` are pairs of column i and i + ``rotary`` / 2, and what is not
    rotated. If the work on the result needs whole heads, as a norm over them does, it is ``apart``: a tile of a whole
    head would leave most of the processors without work in decoding.
    """

    anchor: Node
    sections: tuple[Section, ...]
    head_dim: int | None
    order: Order = "neighbours"
    rotary: int = 0
    apart: bool = False

    @property
    def weight(self) -> Node:
        weight = self.anchor.args[1]
        assert isinstance(weight, Node)
        return weight

    @property
    def depth(self) -> int:
        """The length of the sums."""
        size = type_of(self.weight).shape[1]
        assert isinstance(size, int)
        return size

    @property
    def lanes(self) -> int:
        """Results that are combined with each other, column by column."""
        return len(self.sections[0].lanes)

    @property
    def offsets(self) -> list[int]:
        """The columns of each lane, counted from those of the first."""
        starts = self.sections[0].starts
        return [start - starts[0] for start in starts]

    @property
    def width(self) -> int:
        """Columns that the tiles cover: those of one lane of each section."""
        return sum(section.width for section in self.sections)


def plan(graph: Graph) -> Plan:
    """Find the anchor and the sections of a region."""
    anchor = next(node for node in graph.calls() if op_name(node.target) in PROJECTIONS)
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
    if not isinstance(head_dim, int):
        return Plan(anchor, tuple(sections), None)
    return Plan(anchor, tuple(sections), head_dim, *_order(set().union(*reach.values()), head_dim))


def _order(work: set[Node], head_dim: int) -> tuple[Order, int, bool]:
    """The order of the columns of a head, how many of them are rotated, and whether the work needs whole heads."""
    norms = any(op_name(node.target) in ("nn.rms_norm", "nn.layer_norm") for node in work)
    ropes = {_rotation(node) for node in work if op_name(node.target) == "nn.rope"}
    if norms or len(ropes) > 1 or (ropes and head_dim % 2):
        return "neighbours", 0, True
    pairing, width = next(iter(ropes), ("interleaved", 0))
    return ("halves", width, False) if pairing == "half" else ("neighbours", 0, False)


def _rotation(rope: Node) -> tuple[str, int]:
    cos, pairing = rope.args[1], rope.args[3] if len(rope.args) > 3 else "half"
    assert isinstance(cos, Node)
    width = type_of(cos).shape[-1]
    assert isinstance(width, int)
    return str(pairing), width


def _descendants(root: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [user for user in root.users if user.op == "call_function"]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [user for user in node.users if user.op == "call_function"]
    return found
