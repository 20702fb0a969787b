"""A folded graph as a loop over its equal layers: what a runtime needs to run it without writing all layers out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from .graph import Graph, is_constant, type_of
from .ops import Op
from .period import Period, leaves, substituted
from .types import TensorType
from .unfold import Unfolded


def _carried(first: Any) -> Any:
    return first


# What a turn of the loop has from the one before; the first turn reads ``first``. It is no operator of the text form.
CARRIED = Op("loop.carried", _carried, True, tuple(inspect.signature(_carried).parameters.values()))


@dataclass(frozen=True)
class Stage:
    """Nodes of a loop's graph that are run one after another, once for each of ``times``."""

    nodes: list[Node]
    times: range


@dataclass(frozen=True)
class Loop:
    """A graph of which one stage may be run many times, each time with the weights and caches of other layers.

    ``stages`` are all nodes of ``graph`` in order. ``carries`` are its ``loop.carried`` nodes, with which the repeated
    stage begins, each with the value of one turn that it has in the next.
    """

    graph: Graph
    stages: list[Stage]
    carries: dict[Node, Node] = field(default_factory=dict)
    _period: Period | None = None
    _folded: dict[Node, Node] = field(default_factory=dict)  # the nodes of ``graph`` as the period knows them

    @staticmethod
    def plain(graph: Graph) -> Loop:
        """A graph that is run as it stands."""
        return Loop(graph, [Stage(list(graph.nodes), range(1))])

    @property
    def repeats(self) -> bool:
        """Whether some of its nodes are run more than once."""
        return any(len(stage.times) > 1 for stage in self.stages)

    @property
    def short(self) -> Loop:
        """The layers that the graph states alone: each of the distinct ones, some of the equal ones."""
        return replace(self, stages=[Stage(stage.nodes, range(1)) for stage in self.stages])

    def weight(self, node: Node, time: int) -> str:
        """The name of the weight that a ``weight(...)`` reads at that time."""
        return self._period.weight(self._folded[node], time) if self._period else str(node.args[0])

    def origin(self, node: Node, time: int) -> str:
        """Name and type of the weight that a ``weight(...)`` reads at that time: one may be read in several types."""
        return f"{self.weight(node, time)}: {type_of(node).dtype}"

    def cache(self, node: Node, time: int) -> str:
        """Role and layer of a ``cache(...)`` at that time: ``"k0"``."""
        layer = self._period.layer(self._folded[node], time) if self._period else node.args[1]
        return f"{node.args[0]}{layer}"

    def caches(self) -> dict[str, TensorType]:
        """The type of every cache of the model, by role and layer."""
        return {
            self.cache(node, time): type_of(node)
            for stage in self.stages
            for nodes in [[node for node in stage.nodes if str(node.target) == "cache"]]
            for time in stage.times
            for node in nodes
        }


def loop_of(whole: Unfolded) -> Loop:
    """A model as a loop over its equal layers; if it is none, all of it as it stands."""
    period = whole.period
    if period is None:
        return Loop.plain(whole.folded)
    handed_on = _handed_on(period)
    if any(is_constant(first) != is_constant(later) for first, later in handed_on):
        return Loop.plain(
            whole.graph
        )  # the first turn alone computes from weights what later ones compute in each step
    graph = Graph(whole.folded.name, whole.folded.dims, whole.folded.options)
    made: dict[Node, Node] = {}
    carries: dict[tuple[Node, Node], Node] = {}
    stages: list[Stage] = []
    for nodes, times in whole.stages():
        copies: list[Node] = []
        for node in nodes:
            if node is period.nodes[0]:
                carries = {pair: _carry(graph, pair[0], made[pair[0]]) for pair in handed_on}
                copies.extend(carries.values())
            sources = (carries[pair] if pair[1] else None for pair in _operands(period, node))
            copy = graph.node_copy(node, made.__getitem__)
            if any(period.carried.get(node, ())):
                copy.args = tuple(substituted(item, sources, made) for item in node.args)
            copy.name, copy.meta = node.name, dict(node.meta)
            made[node] = copy
            copies.append(copy)
        stages.append(Stage(copies, times))
    closed = {node: made[later] for (_, later), node in carries.items()}
    return Loop(graph, stages, closed, period, {copy: node for node, copy in made.items()})


def _operands(period: Period, node: Node) -> Iterator[tuple[Any, Any]]:
    """What a node reads, each with what makes it in the turn before, if it comes from there."""
    return zip(leaves(node.args), period.carried.get(node, ()))


def _handed_on(period: Period) -> list[tuple[Node, Node]]:
    """What turns read from the turn before: as it is in the first turn, and what makes it; each once, in order."""
    pairs = [pair for node in period.nodes for pair in _operands(period, node) if pair[1]]
    return list(dict.fromkeys(pairs))


def _carry(graph: Graph, first: Node, source: Node) -> Node:
    made = graph.create_node("call_function", CARRIED, (source,))
    made.meta = {"type": first.meta["type"], "constant": is_constant(first)}
    return made
