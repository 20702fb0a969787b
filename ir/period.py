"""The period of a folded graph: the nodes that stand for many layers, what they hand on, and what changes with each time.

The graph of a folded model holds the attention of its last three periods; what lies between the first and the second of
them, and between the second and the third, must be the same work, one step further on. That is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import Node

from .fold import Fold
from .graph import Graph, Region
from .ops import op_name

_ATTENTION = frozenset({"nn.attention", "nn.paged_attention"})
# Operators that state which layer they belong to, and where.
LAYER_ARGUMENT = {"cache": 1, "nn.attention": 3}
_LAYER = re.compile(r"\bl(\d+)_")


class NotPeriodic(Exception):
    """The folded layers are not alike in this graph; says where."""


def write_fold(graph: Graph, fold: Fold) -> None:
    """State in a graph that its layers stand for more."""
    graph.options.update(fold_layers=fold.layers, fold_period=fold.period)


def fold_of(graph: Graph) -> Fold | None:
    """What a graph states of its folded layers."""
    layers = graph.options.get("fold_layers")
    if layers is None:
        return None
    traced = 1 + max(layer_of(node.name) for node in graph.calls() if op_name(node.target) in _ATTENTION)
    return Fold(layers, graph.options["fold_period"], traced)


def repeats(fold: Fold) -> int:
    """How often the repeated period is added."""
    return (fold.layers - fold.traced) // fold.period


def spread(name: str, fold: Fold, *texts: str) -> list[tuple[str, ...]]:
    """A value's name, and texts about it, for each layer of the whole model that its layer stands for."""
    layer = layer_of(name)
    if layer < fold.traced - 2 * fold.period:
        return [(name, *texts)]
    last = layer >= fold.traced - fold.period
    times = range(repeats(fold), repeats(fold) + 1) if last else range(repeats(fold) + 1)
    pieces = [_LAYER.split(text) for text in (name, *texts)]
    return [tuple(_joined(piece, fold.period * time) for piece in pieces) for time in times]


def window(graph: Graph, fold: Fold) -> list[Node]:
    """The nodes that are repeated."""
    return _windows(graph, fold)[0]


def layer_of(name: str) -> int:
    """The layer that a value is named after; -1 if none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def shifted(text: str, shift: int) -> str:
    """A text about a layer, said of the layer ``shift`` further on."""
    return _joined(_LAYER.split(text), shift)


def _joined(pieces: list[str], shift: int) -> str:
    """A text cut at its layers, whose numbers are every second piece, said of the layer ``shift`` further on."""
    text = pieces[0]
    for number, rest in zip(pieces[1::2], pieces[2::2]):
        text += f"l{int(number) + shift}_{rest}"
    return text


def leaves(value: Any) -> Iterator[Any]:
    """What an argument holds, in order, lists and tuples taken apart."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def substituted(value: Any, others: Iterator[Node | None], made: Mapping[Node, Node]) -> Any:
    """An argument with each of its leaves replaced by the next of ``others``; where that is nothing, nodes by ``made``."""
    if isinstance(value, (list, tuple)):
        return [substituted(item, others, made) for item in value]
    other = next(others)
    return other if other is not None else made[value] if isinstance(value, Node) else value


class Period:
    """The repeated nodes of a folded graph.

    ``nodes`` are done ``times`` times in all. ``carried`` gives for each of them its operands in order: the node that
    makes the operand in the period before, for those that come from there (the first time they are as they stand), else
    nothing. Whatever stands before ``nodes`` belongs to time 0, whatever stands after them to the last time.

    Raises:
        NotPeriodic: the layers that stand for others are not alike.
    """

    def __init__(self, graph: Graph, fold: Fold) -> None:
        self.fold = fold
        self.times = 1 + repeats(fold)
        self.nodes, second = _windows(graph, fold)
        self.pair = dict(zip(self.nodes, second))
        self.carried: dict[Node, list[Node | None]] = {}
        self._prefixes: set[str] = set()
        self._cache_step = 0
        for left, right in self.pair.items():
            self.carried[left] = list(self._operands(left, right))
        later = set(second)
        regions = {node.meta.get("region") for node in self.nodes} - {None}
        for node in graph.calls():
            if node not in self.pair and node.meta.get("region") in regions:
                raise NotPeriodic(f"the kernel of {node.name} reaches into the next layers")
        for node in self.nodes:
            for user in node.users:
                if user not in self.pair and user not in later:
                    raise NotPeriodic(f"{node.name} is read by {user.name}, in another layer than the next one")

    def weight(self, node: Node, time: int) -> str:
        """The name of the weight that a ``weight(...)`` reads at that time."""
        name = str(node.args[0])
        for prefix in self._prefixes if time else ():
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdecimal():
                return f"{prefix}{int(number) + time * self.fold.period}{dot}{rest}"
        return name

    def layer(self, node: Node, time: int) -> int:
        """The layer that an operator of ``LAYER_ARGUMENT`` states at that time."""
        return int(str(node.args[LAYER_ARGUMENT[str(node.target)]])) + time * self._cache_step

    def _operands(self, left: Node, right: Node) -> Iterator[Node | None]:
        """Compare a node with the same one a period later; yields those of its operands that are handed on from there."""
        if left.target != right.target or left.meta["type"] != right.meta["type"] or left.kwargs != right.kwargs:
            raise NotPeriodic(f"{left.name} and {right.name} differ")
        pairs = list(zip(leaves(left.args), leaves(right.args), strict=True))
        for place, (ours, theirs) in enumerate(pairs):
            handed_on = ours not in self.pair and theirs in self.pair if isinstance(ours, Node) else False
            if not (handed_on or self._alike(left, place, ours, theirs)):
                raise NotPeriodic(f"{left.name} and {right.name} differ in {ours} and {theirs}")
            yield theirs if handed_on else None

    def _alike(self, at: Node, place: int, ours: Any, theirs: Any) -> bool:
        if isinstance(ours, Node):
            return self.pair.get(ours, ours) is theirs
        if str(at.target) == "weight":
            return bool(ours == theirs) or self._learn(ours, theirs)
        if LAYER_ARGUMENT.get(str(at.target)) == place:
            self._cache_step = self._cache_step or theirs - ours
            return bool(theirs - ours == self._cache_step)
        return type(ours) is type(theirs) and bool(ours == theirs)

    def _learn(self, ours: str, theirs: str) -> bool:
        """Two weights of neighbouring periods: their names differ in the number of the layer alone."""
        left, right = ours.split("."), theirs.split(".")
        differ = [place for place, (one, other) in enumerate(zip(left, right)) if one != other]
        if len(left) != len(right) or len(differ) != 1 or not left[differ[0]].isdecimal():
            return False
        self._prefixes.add("".join(f"{part}." for part in left[: differ[0]]))
        return right[differ[0]] == str(int(left[differ[0]]) + self.fold.period)


def _windows(graph: Graph, fold: Fold) -> tuple[list[Node], list[Node]]:
    """The nodes from the attention of the third last period on, and from that of the second last."""
    calls = list(graph.calls())
    attention = [place for place, node in enumerate(calls) if op_name(node.target) in _ATTENTION]
    step = sum(layer_of(calls[place].name) >= fold.traced - fold.period for place in attention)
    if step == 0 or len(attention) < 3 * step:
        raise NotPeriodic("the layers do not attend in turn")
    first, second, third = (attention[-count * step] for count in (3, 2, 1))
    if second - first != third - second:
        raise NotPeriodic(f"{calls[first].name} and {calls[second].name} are followed by different work")
    return calls[first:second], calls[second:third]


def regions_in(graph: Graph) -> list[Region]:
    """The kernel regions of a graph, each once, in order."""
    found = [node.meta["region"] for node in graph.calls() if node.meta.get("region") is not None]
    return list(dict.fromkeys(found))
