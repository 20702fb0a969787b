"""Where a value is when several ranks run a graph: whole on each, cut along a dim, row by row where its experts are, or as
a sum of parts.

The rules of the operators are a table: ``placement_of`` gives the placement of a result from those of its operands, or
says which operand has to be placed otherwise first. A graph is only annotated; nothing is moved unless it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .graph import Graph, flat_types, is_constant
from .ops import POINTWISE, is_collective, op_name
from .types import DTYPES, TensorType

OPTION = "tensor_parallel"
"""The option of a graph that says how many ranks it is for."""
VOCABULARY = "vocabulary"
"""The option of a graph that returns logits in parts, columns of each rank's own: how many columns of all together count."""


@dataclass(frozen=True)
class Shard:
    """Each rank holds its part of ``dim``: of each of the ``sections`` that the dim is made of, one after another."""

    dim: int
    sections: tuple[int, ...]

    def __str__(self) -> str:
        return f"shard({self.dim})"


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the ranks hold."""

    def __str__(self) -> str:
        return "partial"


@dataclass(frozen=True)
class Routed:
    """Of rows ``[T, J, ...]``, one for each pair of a token and an expert, a rank has those that go to its experts.

    ``ids`` are the experts that the tokens go to, so many there are. What a rank has in place of other rows counts for
    nothing.
    """

    ids: Node
    experts: int

    def __str__(self) -> str:
        return "routed"


PARTIAL = Partial()
Placement = Shard | Routed | Partial | None
"""``None``: every rank holds the value whole."""


class Needs(Exception):
    """An operator that takes an operand only if it is ``wanted`` (``None``: whole); says why."""

    def __init__(self, operand: Node, wanted: Placement, why: str) -> None:
        super().__init__(why)
        self.operand = operand
        self.wanted = wanted


Known = Callable[[Node], Placement]
Rule = Callable[[Node, Known, int], Placement]

_RULES: dict[str, Rule] = {}
# Operators that give a sum of parts if they are given one, under the conditions of their rules.
_LINEAR: set[str] = set()
# Operators whose rules know what to do with rows that are where their experts are.
_ROUTED: set[str] = set()
_GATED = frozenset({"nn.silu_mul", "nn.gelu_mul"})


def rule(*names: str, linear: bool = False, routed: bool = False) -> Callable[[Rule], Rule]:
    """Enter the rule of operators. Unless it is ``linear`` it is not asked about sums of parts, which must be summed up, and
    unless it is ``routed`` not about rows that are where their experts are."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        if linear:
            _LINEAR.update(names)
        if routed:
            _ROUTED.update(names)
        return function

    return register


def placement_of(node: Node, known: Known, ranks: int) -> Placement:
    """The placement of a call's result (of each, if there are several).

    Raises:
        Needs: the operator does not take an operand as it is placed.
    """
    name = op_name(node.target)
    placed = [item for item in node.all_input_nodes if known(item) is not None]
    if not placed and not is_collective(node.target):
        return None
    routed = next((item for item in placed if isinstance(known(item), Routed)), None)
    if routed is not None and name not in _ROUTED:
        return _row_by_row(node, routed, known)
    found = _RULES.get(name)
    if found is None:
        if name in POINTWISE or name in _GATED:
            return _pointwise(node, known, ranks)
        raise Needs(placed[0], None, f"{node.name} ({name}) is not known to work on parts")
    if name not in _LINEAR:
        for item in placed:
            if known(item) == PARTIAL:
                raise Needs(item, None, f"{node.name} ({name}) does not work on parts of a sum")
    return found(node, known, ranks)


def placements(graph: Graph, ranks: int) -> dict[Node, Placement]:
    """The placement of every value of a graph, from its cuts on.

    Raises:
        Needs: an operator does not take an operand as it is placed.
    """
    known: dict[Node, Placement] = {}
    for node in graph.nodes:
        if node.op == "output":
            check_result(node, known.__getitem__, VOCABULARY in graph.options)
        known[node] = placement_of(node, known.__getitem__, ranks) if node.op == "call_function" else None
    return known


def check_result(output: Node, known: Known, in_parts: bool = False) -> None:
    """Check that what a graph returns is whole, or (``in_parts``) that each rank has some of the columns."""
    for item in output.all_input_nodes:
        columns = Shard(len(shape_of(item)) - 1, shape_of(item)[-1:])
        wanted = columns if in_parts else None
        if known(item) != wanted:
            raise Needs(item, wanted, "the graph returns it")


def annotate(node: Node, placement: Placement) -> None:
    """State the placement in a value's type."""
    text = "" if placement is None else str(placement)
    kinds = [TensorType(kind.dtype, kind.shape, text) for kind in flat_types(node.meta["type"])]
    node.meta["type"] = tuple(kinds) if isinstance(node.meta["type"], tuple) else kinds[0]


def divided(dim: int, sections: Sequence[int], ranks: int, operand: Node) -> Shard:
    """A cut of a dim made of ``sections``, if it can be; else its operand has to be whole."""
    for size in sections:
        if size % ranks:
            raise Needs(operand, None, f"{size} cannot be divided among {ranks} ranks")
    return Shard(dim, tuple(sections))


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a value, of the first if it has several."""
    return flat_types(node.meta["type"])[0].shape


def cut_of(node: Node, known: Known) -> Shard | None:
    """The placement of an operand that is cut."""
    found = known(node)
    return found if isinstance(found, Shard) else None


def whole(known: Known, why: str, *operands: Any) -> None:
    """Check that operands are whole."""
    for item in operands:
        if isinstance(item, Node) and known(item) is not None:
            raise Needs(item, None, why)


def _row_by_row(node: Node, routed: Node, known: Known) -> Placement:
    """What works on each row by itself leaves it where it is."""
    name, found = op_name(node.target), known(routed)
    assert isinstance(found, Routed)
    along = name == "aten.slice.Tensor" and node.args[1] in (-1, len(shape_of(node)) - 1)
    works = along or name in POINTWISE or name in _GATED or name in ("nn.quantize", "nn.absmax")
    if not works or shape_of(node)[:-1] != shape_of(found.ids):
        raise Needs(routed, None, f"{node.name} ({name}) is not known to work on the rows of some experts")
    for item in node.all_input_nodes:
        if known(item) not in (None, found):
            raise Needs(item, None, f"{node.name} ({name}) reads it with the rows of some experts")
    return found


def _pointwise(node: Node, known: Known, ranks: int) -> Placement:
    operands = list(node.all_input_nodes)
    name = f"{node.name} ({op_name(node.target)})"
    sums = [item for item in operands if known(item) == PARTIAL]
    cut = [item for item in operands if isinstance(known(item), Shard)]
    if not cut:
        if sums and not _keeps_sums(node, sums):
            raise Needs(sums[0], None, f"{name} does not work on parts of a sum")
        return PARTIAL if sums else None
    if sums:
        raise Needs(sums[0], None, f"{name} does not work on parts of a sum")
    first = cut_of(cut[0], known)
    assert first is not None
    place = first.dim - len(shape_of(cut[0]))
    for item in operands:
        shape, found = shape_of(item), cut_of(item, known)
        if len(shape) < -place or shape[place] == 1:
            continue
        wanted = Shard(place + len(shape), first.sections)
        if found is None and is_constant(item):
            raise Needs(item, wanted, f"{name} reads it with a part of {cut[0].name}")
        if found is None:
            raise Needs(cut[0], None, f"{name} reads it with {item.name}, which each rank has whole")
        if found != wanted:
            raise Needs(item, None, f"{name} reads it with {cut[0].name}, which is cut otherwise")
    return Shard(place + len(shape_of(node)), first.sections)


def _keeps_sums(node: Node, sums: Sequence[Node]) -> bool:
    """Whether an operator on each rank's part gives the parts of its result."""
    name, operands = op_name(node.target), [item for item in node.args if isinstance(item, Node)]
    if name in ("aten.add.Tensor", "aten.sub.Tensor"):
        return len(operands) == 2 and all(item in sums for item in operands)
    if name == "aten.mul.Tensor":
        return sum(item in sums for item in operands) == 1
    if name == "aten.div.Tensor":
        return not node.kwargs and node.args[0] in sums and node.args[1] not in sums
    if name == "aten.to.dtype":
        # A part that is rounded is no part of the sum that is rounded.
        before, after = (DTYPES[flat_types(item.meta["type"])[0].dtype] for item in (sums[0], node))
        return after.is_floating_point and after.itemsize >= before.itemsize
    return name == "aten.neg"
