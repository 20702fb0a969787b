"""Where projections are cut so that ranks share the work: a plan, made from the placements that operators take.

Each projection of whole rows with a constant weight is a candidate: its outputs are cut (column parallel). The placements
that follow are found operator by operator. A projection that reads parts of rows is cut along its inputs (row parallel)
and gives a part of a sum; if it needs whole rows, these are gathered, its outputs are cut, and they are gathered, too. Where
another operator needs whole what a candidate has cut, the candidate stays whole, for that reason.

A weight for each of several experts may also be cut between these (expert parallel): where it is asked for, and where
their outputs cannot be cut, or their rows would have to be put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, is_constant
from ..ir.ops import op_name
from ..ir.placement import PARTIAL, Known, Needs, Placement, Routed, Shard, check_result, placement_of
from .ledger import PassReport
from .lookups import is_lookup, table_and_cut
from .projections import fits, is_by_expert, is_grouped, is_projection, is_returned, rows_and_weight, ways_to_cut
from .quantize import matrices_of

Site = tuple[Node, Placement]
"""An operand and the placement that a user needs it in."""


@dataclass
class Plan:
    """``placed``: every value; ``moves``: for a user, the operands that have to be placed otherwise for it.

    ``column`` are the projections whose outputs are cut, ``row`` those whose inputs are, ``experts`` those of which a rank
    has some of the experts, ``kept`` those that every rank computes whole, with the reason. ``gathered`` are those that
    read whole rows put together from parts, and ``instead`` those that could not be cut as they should be, with the reason.
    """

    placed: dict[Node, Placement] = field(default_factory=dict)
    moves: dict[Node, list[Site]] = field(default_factory=dict)
    column: list[Node] = field(default_factory=list)
    row: list[Node] = field(default_factory=list)
    experts: list[Node] = field(default_factory=list)
    kept: dict[Node, str] = field(default_factory=dict)
    gathered: dict[Node, str] = field(default_factory=dict)
    instead: dict[Node, str] = field(default_factory=dict)


def plan_for(
    graph: Graph,
    ranks: int,
    whole: Mapping[str, str],
    report: PassReport,
    gathered: Sequence[str] = (),
    by_expert: Sequence[str] = (),
) -> Plan:
    """The plan for a graph that states no placements.

    Args:
        whole: patterns of weights that are not to be cut, with the reason; nor are sites that ``report`` does not allow.
        gathered: patterns of weights whose outputs, if they are cut, may be gathered where something needs them whole.
        by_expert: patterns of weights of experts that are to be cut between experts.
    """
    return _Planner(graph, ranks, whole, report, gathered, by_expert).run()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        ranks: int,
        whole: Mapping[str, str],
        report: PassReport,
        gathered: Sequence[str],
        by_expert: Sequence[str],
    ) -> None:
        self.nodes = list(graph.nodes)
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.ranks = ranks
        self.whole = whole
        self.report = report
        self.may_be_gathered = self.named(gathered)
        self.by_expert = {node for node in self.named(by_expert) if is_grouped(node)}
        self.plan = Plan()
        self.sources: dict[Node, frozenset[Node]] = {}  # the projections that a cut value comes from
        self.cut: dict[Node, Shard] = {}  # how each of these is cut
        self.refused: dict[tuple[Node, Shard], str] = {}  # how they cannot be, with the reason
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
                self.refused[source, self.cut[source]] = why
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
                wanted = next((way for item, way in moves if item is weight and isinstance(way, Shard)), None)
                if wanted is not None and is_by_expert(node, wanted):
                    self.plan.experts.append(node)
                elif wanted is not None:
                    (self.plan.row if self.plan.placed[node] == PARTIAL else self.plan.column).append(node)
                if node in self.cut and wanted is not None and wanted != self.ways(node)[0]:
                    self.plan.instead[node] = self.reason_against(node, self.ways(node)[0])
        return self.plan

    def named(self, patterns: Sequence[str]) -> set[Node]:
        """The projections with weights that one of the patterns fits."""
        return {
            node
            for node in self.nodes
            if is_projection(node) and any(fits(key, matrices_of(rows_and_weight(node)[1])) for key in patterns)
        }

    def place(self, node: Node) -> tuple[Node, str] | None:
        """Place a value, or say which operand cannot be cut, and why."""
        moved: dict[Node, Placement] = {}

        def known(item: Node) -> Placement:
            return moved[item] if item in moved else self.plan.placed[item]

        if is_projection(node):
            x, weight = rows_and_weight(node)
            pattern = self.pattern(weight)
            why = self.whole[pattern] if pattern is not None else ""
            if why and isinstance(known(x), (Shard, Routed)) and not self.gather(x, node, moved, why):
                self.plan.kept[node] = why
                return x, f"{node.name} reads it whole, since {why}"
            if node in self.by_expert and isinstance(known(x), Shard) and self.may_be_by_expert(x):
                return x, f"{node.name} is to have some of the experts"
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
                    self.refused[node, self.cut[node]] = str(need)
                    moved.clear()
                    asked.clear()
                    seed = self.candidate(node, known)
                    moved.update([seed] if seed else [])
                elif wanted is None and isinstance(current, (Shard, Routed)):
                    if not self.gather(operand, node, moved, str(need)):
                        return operand, str(need)
                    if is_projection(node) and seed is None:
                        seed = self.candidate(node, known)
                        moved.update([seed] if seed else [])
                elif isinstance(wanted, Shard) and any(size % self.ranks for size in wanted.sections):
                    cut = next(item for item in node.all_input_nodes if isinstance(known(item), (Shard, Routed)))
                    return cut, str(need)
                elif current is not None and wanted is not None:
                    return operand, str(need)
                else:
                    moved[operand] = wanted
        self.plan.placed[node] = found
        if moved:
            self.plan.moves[node] = list(moved.items())
        if isinstance(found, (Shard, Routed)):
            before = [
                self.sources[item]
                for item in node.all_input_nodes
                if item in self.sources and isinstance(known(item), (Shard, Routed))
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
        if reads and self.pattern(rows_and_weight(user)[1]) is None and self.may_be_by_expert(operand):
            return False
        rounds = op_name(user.target) == "nn.quantize" and not is_constant(user)
        made_late = self.sources[operand] <= self.plan.gathered.keys() | self.may_be_gathered
        if not (user.op == "output" or is_returned(user) or reads or rounds or made_late):
            return False
        moved[operand] = None
        for item in [user] if reads else user.users if rounds and operand is user.args[0] else ():
            self.plan.gathered[item] = why
        return True

    def candidate(self, node: Node, known: Known) -> tuple[Node, Shard] | None:
        """The weight of a projection of whole rows, or the table of a lookup, and how it is cut."""
        if is_lookup(node):
            return table_and_cut(node, self.ranks)
        if not is_projection(node):
            return None
        x, weight = rows_and_weight(node)
        if not is_constant(weight) or node in self.plan.kept or isinstance(known(x), (Shard, Routed)):
            return None
        pattern = self.pattern(weight)
        ways = self.ways(node)
        reasons = [self.reason_against(node, way) for way in ways]
        if pattern is not None:
            self.plan.kept[node] = self.whole[pattern]
        elif all(reasons):
            self.plan.kept[node] = "; ".join(reasons)
        elif node not in self.asked and not self.report.allows(node.name):
            self.plan.kept[node] = ""
        self.asked.add(node)
        if node in self.plan.kept:
            return None
        self.cut[node] = ways[reasons.index("")]
        return weight, self.cut[node]

    def ways(self, node: Node) -> list[Shard]:
        """How the weight of a projection may be cut, the better way first."""
        ways = ways_to_cut(node, self.ranks)
        return ways[::-1] if node in self.by_expert else ways

    def reason_against(self, node: Node, way: Shard) -> str:
        """Why a weight cannot be cut in a way, as far as is known; empty if it can."""
        size = next((size for size in way.sections if size % self.ranks), None)
        if size is None:
            return self.refused.get((node, way), "")
        return f"{size} outputs cannot be divided among {self.ranks} ranks"

    def may_be_by_expert(self, rows: Node) -> bool:
        """Whether rows that are cut along their features come from experts that could be divided otherwise."""
        return all(
            any(is_by_expert(node, way) and not self.reason_against(node, way) for way in self.ways(node))
            for node in self.sources[rows]
        )

    def pattern(self, weight: Node) -> str | None:
        """The pattern by which a weight is not to be cut."""
        return next((key for key in self.whole if fits(key, matrices_of(weight))), None)
