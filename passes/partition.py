"""Where projections are cut so that ranks share the work: a plan, made from the placements that operators take.

Each projection of whole rows with a constant weight is a candidate: its outputs are cut (column parallel). The placements
that follow are found operator by operator. A projection that reads parts of rows is cut along its inputs (row parallel)
and gives a part of a sum; if it needs whole rows, these are gathered, its outputs are cut, and they are gathered, too. Where
another operator needs whole what a candidate has cut, the candidate stays whole, for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise

from torch.fx import Node

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, is_constant
from ..ir.ops import PROJECTIONS, op_name
from ..ir.placement import PARTIAL, Known, Needs, Placement, Shard, check_result, placement_of, shape_of
from .ledger import PassReport
from .quantize import matrices_of

Site = tuple[Node, Placement]
"""An operand and the placement that a user needs it in."""


@dataclass
class Plan:
    """``placed``: every value; ``moves``: for a user, the operands that have to be placed otherwise for it.

    ``column`` are the projections whose outputs are cut, ``row`` those whose inputs are, ``kept`` those that every rank
    computes whole, with the reason. ``gathered`` are those that read whole rows put together from parts, with the reason.
    """

    placed: dict[Node, Placement] = field(default_factory=dict)
    moves: dict[Node, list[Site]] = field(default_factory=dict)
    column: list[Node] = field(default_factory=list)
    row: list[Node] = field(default_factory=list)
    kept: dict[Node, str] = field(default_factory=dict)
    gathered: dict[Node, str] = field(default_factory=dict)


def plan_for(
    graph: Graph, ranks: int, whole: Mapping[str, str], report: PassReport, gathered: Sequence[str] = ()
) -> Plan:
    """The plan for a graph that states no placements.

    Args:
        whole: patterns of weights that are not to be cut, with the reason; nor are sites that ``report`` does not allow.
        gathered: patterns of weights whose outputs, if they are cut, may be gathered where something needs them whole.
    """
    return _Planner(graph, ranks, whole, report, gathered).run()


class _Planner:
    def __init__(
        self, graph: Graph, ranks: int, whole: Mapping[str, str], report: PassReport, gathered: Sequence[str]
    ) -> None:
        self.nodes = list(graph.nodes)
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.ranks = ranks
        self.whole = whole
        self.report = report
        self.may_be_gathered = {
            node
            for node in self.nodes
            if is_projection(node) and any(fits(key, matrices_of(rows_and_weight(node)[1])) for key in gathered)
        }
        self.plan = Plan()
        self.sources: dict[Node, frozenset[Node]] = {}  # the projections that a cut value comes from
        self.asked: set[Node] = set()

    def run(self) -> Plan:
        at = 0
        while at < len(self.nodes):
            node = self.nodes[at]
            blamed = self.place(node)
            if blamed is None:
                at += 1
                continue
            operand, why = blamed
            if operand not in self.sources:
                raise UnsupportedModelError(f"tensor_parallel: {node.name} cannot be divided: {why}")
            for source in self.sources[operand]:
                self.plan.kept[source] = why
            back = min(map(self.places.__getitem__, self.sources[operand]))
            for later in self.nodes[back : at + 1]:
                self.plan.placed.pop(later, None)
                self.plan.moves.pop(later, None)
                self.plan.gathered.pop(later, None)
                self.sources.pop(later, None)
            at = back
        for node, moves in self.plan.moves.items():
            if is_projection(node):
                weight = rows_and_weight(node)[1]
                dims = [wanted.dim for item, wanted in moves if item is weight and isinstance(wanted, Shard)]
                if dims:
                    (self.plan.row if self.plan.placed[node] == PARTIAL else self.plan.column).append(node)
        return self.plan

    def place(self, node: Node) -> tuple[Node, str] | None:
        """Place a value, or say which operand cannot be cut, and why."""
        moved: dict[Node, Placement] = {}

        def known(item: Node) -> Placement:
            return moved[item] if item in moved else self.plan.placed[item]

        if is_projection(node):
            x, weight = rows_and_weight(node)
            pattern = self.pattern(weight)
            why = self.whole[pattern] if pattern is not None else ""
            if why and isinstance(known(x), Shard) and not self.gather(x, node, moved, why):
                self.plan.kept[node] = why
                return x, f"{node.name} reads it whole, since {why}"
        seed = self.candidate(node, known)
        if seed is not None:
            moved[seed[0]] = seed[1]
        found: Placement = None
        asked: set[Site] = set()
        while True:
            try:
                if node.op == "output":
                    check_result(node, known)
                elif node.op == "call_function":
                    found = placement_of(node, known, self.ranks)
                break
            except Needs as need:
                operand, wanted = need.operand, need.wanted
                if (operand, wanted) in asked:
                    raise UnsupportedModelError(f"tensor_parallel: {node.name} cannot be divided: {need}") from need
                asked.add((operand, wanted))
                current = known(operand)
                if wanted is None and seed is not None and operand is seed[0]:
                    self.plan.kept[node] = str(need)
                    moved.clear()
                    seed = None
                elif wanted is None and isinstance(current, Shard):
                    if not self.gather(operand, node, moved, str(need)):
                        return operand, str(need)
                    if is_projection(node) and seed is None:
                        seed = self.candidate(node, known)
                        moved.update([seed] if seed else [])
                elif isinstance(wanted, Shard) and any(size % self.ranks for size in wanted.sections):
                    cut = next(item for item in node.all_input_nodes if isinstance(known(item), Shard))
                    return cut, str(need)
                elif current is not None and wanted is not None:
                    return operand, str(need)
                else:
                    moved[operand] = wanted
        self.plan.placed[node] = found
        if moved:
            self.plan.moves[node] = list(moved.items())
        if isinstance(found, Shard):
            before = [
                self.sources[item]
                for item in node.all_input_nodes
                if item in self.sources and isinstance(known(item), Shard)
            ]
            self.sources[node] = frozenset({node} if seed else ()).union(*before)
        return None

    def gather(self, operand: Node, user: Node, moved: dict[Node, Placement], why: str) -> bool:
        """Put the parts of an operand together for a user, if it is worth it: they are few, or rows of a product that is
        divided otherwise then."""
        found = self.plan.placed[operand]
        if not isinstance(found, Shard) or len(found.sections) > 1 or operand not in self.sources:
            return False
        reads = is_projection(user) and operand is rows_and_weight(user)[0]
        rounds = op_name(user.target) == "nn.quantize" and not is_constant(user)
        made_late = self.sources[operand] <= self.plan.gathered.keys() | self.may_be_gathered
        if not (user.op == "output" or _is_returned(user) or reads or rounds or made_late):
            return False
        moved[operand] = None
        for item in [user] if reads else user.users if rounds and operand is user.args[0] else ():
            self.plan.gathered[item] = why
        return True

    def candidate(self, node: Node, known: Known) -> tuple[Node, Shard] | None:
        """The weight of a projection of whole rows, and how it is cut so that the outputs are."""
        if not is_projection(node):
            return None
        x, weight = rows_and_weight(node)
        if not is_constant(weight) or node in self.plan.kept or isinstance(known(x), Shard):
            return None
        dim = _output_dim(node)
        sections = _sections(node)
        size = next((size for size in sections if size % self.ranks), None)
        pattern = self.pattern(weight)
        if pattern is not None:
            self.plan.kept[node] = self.whole[pattern]
        elif size is not None:
            self.plan.kept[node] = f"{size} outputs cannot be divided among {self.ranks} ranks"
        elif node not in self.asked and not self.report.allows(node.name):
            self.plan.kept[node] = ""
        self.asked.add(node)
        return None if node in self.plan.kept else (weight, Shard(dim, sections))

    def pattern(self, weight: Node) -> str | None:
        """The pattern by which a weight is not to be cut."""
        return next((key for key in self.whole if fits(key, matrices_of(weight))), None)


def is_projection(node: Node) -> bool:
    """Whether a value is a product of rows and a weight, or a weight for each of several experts."""
    return node.op == "call_function" and op_name(node.target) in PROJECTIONS | {"nn.grouped_linear"}


def rows_and_weight(node: Node) -> tuple[Node, Node]:
    """The rows and the weight of a projection."""
    x, weight = node.args[0], node.args[2 if op_name(node.target) == "nn.grouped_linear" else 1]
    assert isinstance(x, Node) and isinstance(weight, Node)
    return x, weight


def _output_dim(node: Node) -> int:
    if op_name(node.target) != "nn.grouped_linear":
        return 0
    return 2 if len(node.args) > 4 and node.args[4] else 1


def _sections(node: Node) -> tuple[int, ...]:
    """The outputs of a projection that are read side by side, such as queries, keys and values: each is cut by itself.

    Those that are read alone because the others are not returned are put together first.
    """
    width = shape_of(node)[-1]
    assert isinstance(width, int)
    points = {0, width}
    readers = list(node.users)
    for user in readers:
        if _is_returned(user):
            continue
        if op_name(user.target) == "aten.slice.Tensor" and user.args[1] == -1 and len(user.args) == 4:
            points.update(int(min(bound, width)) for bound in user.args[2:4])  # type: ignore[type-var, arg-type]
        elif user.op == "call_function" and len(user.all_input_nodes) == 1 and shape_of(user) == shape_of(node):
            readers += user.users
    ordered = sorted(points)
    return tuple(stop - start for start, stop in pairwise(ordered))


def _is_returned(node: Node) -> bool:
    """Whether the graph returns a value, and nothing else reads it."""
    return all(user.op == "output" for user in node.users)


def fits(pattern: str, weights: set[str]) -> bool:
    """Whether a pattern fits the name of one of the weights, or of its module."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern) for name in weights)
