"""A folded graph made whole: the layer that stands for many is repeated, each time with weights and caches of its own.

The graph of a folded model holds the attention of its last three periods; what lies between the first and the second of
them, and between the second and the third, must be the same work, one step further on. That is checked, then repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    traced = 1 + max(_layer(node.name) for node in graph.calls() if op_name(node.target) in _ATTENTION)
    return Fold(layers, graph.options["fold_period"], traced)


def repeats(fold: Fold) -> int:
    """How often the repeated period is added."""
    return (fold.layers - fold.traced) // fold.period


def spread(name: str, fold: Fold, *texts: str) -> list[tuple[str, ...]]:
    """A value's name, and texts about it, for each layer of the whole model that its layer stands for."""
    layer = _layer(name)
    if layer < fold.traced - 2 * fold.period:
        return [(name, *texts)]
    last = layer >= fold.traced - fold.period
    times = range(repeats(fold), repeats(fold) + 1) if last else range(repeats(fold) + 1)
    return [tuple(_shifted(text, fold.period * time) for text in (name, *texts)) for time in times]


def window(graph: Graph, fold: Fold) -> list[Node]:
    """The nodes that are repeated."""
    return _windows(graph, fold)[0]


@dataclass
class Unfolded:
    """``graph`` is whole; ``copies`` are the kernel regions that each region of the folded graph became."""

    graph: Graph
    copies: dict[Region, list[Region]] = field(default_factory=dict)


def unfold(graph: Graph) -> Unfolded:
    """The whole graph; the given one, if it is not folded.

    Raises:
        NotPeriodic: the layers that stand for others are not alike.
    """
    fold = fold_of(graph)
    if fold is None:
        return Unfolded(graph, {region: [region] for region in _regions(graph)})
    return _Unfolding(graph, fold).run()


class _Unfolding:
    def __init__(self, graph: Graph, fold: Fold) -> None:
        self.fold = fold
        self.old = graph
        self.first, self.second = _windows(graph, fold)
        self.pair = dict(zip(self.first, self.second))
        # For each repeated node, its operands in order: those that come from the period before, else nothing.
        self.carried: dict[Node, list[Node | None]] = {}
        self.prefixes: set[str] = set()
        self.cache_step = 0
        options = {name: value for name, value in graph.options.items() if not name.startswith("fold_")}
        self.new = Graph(graph.name, graph.dims, options)
        self.made: dict[Node, Node] = {}
        self.names = {node.name for node in graph.nodes}
        self.copies = {region: [region] for region in _regions(graph)}
        self.regions = 1 + max((region.index for region in self.copies), default=0)

    def run(self) -> Unfolded:
        for left, right in self.pair.items():
            self.carried[left] = list(self.operands(left, right))
        later = set(self.second)
        for node in self.first:
            for user in node.users:
                if user not in self.pair and user not in later:
                    raise NotPeriodic(f"{node.name} is read by {user.name}, in another layer than the next one")
        time = 0
        for node in self.old.nodes:
            self.add(node, time, [])
            if node is self.first[-1]:
                for time in range(1, repeats(self.fold) + 1):
                    self.repeat(time)
        return Unfolded(self.new, self.copies)

    def operands(self, left: Node, right: Node) -> Iterator[Node | None]:
        """Compare a node with the same one a period later; yields those of its operands that are handed on from there."""
        if left.target != right.target or left.meta["type"] != right.meta["type"] or left.kwargs != right.kwargs:
            raise NotPeriodic(f"{left.name} and {right.name} differ")
        pairs = list(zip(_leaves(left.args), _leaves(right.args), strict=True))
        for place, (ours, theirs) in enumerate(pairs):
            handed_on = ours not in self.pair and theirs in self.pair if isinstance(ours, Node) else False
            if not (handed_on or self.alike(left, place, ours, theirs)):
                raise NotPeriodic(f"{left.name} and {right.name} differ in {ours} and {theirs}")
            yield theirs if handed_on else None

    def alike(self, at: Node, place: int, ours: Any, theirs: Any) -> bool:
        if isinstance(ours, Node):
            return self.pair.get(ours, ours) is theirs
        if str(at.target) == "weight":
            return bool(ours == theirs) or self.learn(ours, theirs)
        if LAYER_ARGUMENT.get(str(at.target)) == place:
            self.cache_step = self.cache_step or theirs - ours
            return bool(theirs - ours == self.cache_step)
        return type(ours) is type(theirs) and bool(ours == theirs)

    def learn(self, ours: str, theirs: str) -> bool:
        """Two weights of neighbouring periods: their names differ in the number of the layer alone."""
        left, right = ours.split("."), theirs.split(".")
        differ = [place for place, (one, other) in enumerate(zip(left, right)) if one != other]
        if len(left) != len(right) or len(differ) != 1 or not left[differ[0]].isdecimal():
            return False
        self.prefixes.add("".join(f"{part}." for part in left[: differ[0]]))
        return right[differ[0]] == str(int(left[differ[0]]) + self.fold.period)

    def repeat(self, time: int) -> None:
        before = {node: self.made[node] for node in self.first}
        for node in self.first:
            self.add(node, time, [item and before[item] for item in self.carried[node]])

    def add(self, node: Node, time: int, carried: list[Node | None]) -> None:
        """Add a node, moved on by ``time`` periods; ``carried`` are its operands from the period before."""
        if not any(carried):
            made = self.new.node_copy(node, self.made.__getitem__)
        else:
            operands = iter(carried)
            arguments = tuple(self.replaced(item, operands) for item in node.args)
            made = self.new.call_function(node.target, arguments, dict(node.kwargs))  # type: ignore[arg-type]
        self.made[node] = made
        made.name, made.meta = node.name, dict(node.meta)
        if time and node.op == "call_function":
            self.move(made, node, time)

    def move(self, made: Node, node: Node, time: int) -> None:
        """Give a node the weights, caches, name and region that it has ``time`` periods later."""
        shift = time * self.fold.period
        if str(node.target) == "weight":
            made.args = (self.weight_name(str(node.args[0]), shift),)
        elif str(node.target) in LAYER_ARGUMENT:
            place = LAYER_ARGUMENT[str(node.target)]
            layer = int(str(node.args[place])) + time * self.cache_step
            made.args = (*made.args[:place], layer, *made.args[place + 1 :])
            made.name = f"{node.args[0]}_cache_{layer}" if str(node.target) == "cache" else node.name
        if _layer(node.name) >= 0:
            made.name = _shifted(node.name, shift)
        repeated, region = node in self.pair, node.meta.get("region")
        if repeated and made.name == node.name:
            made.name = self.fresh(node.name, time)
        if repeated and region is not None:
            copies = self.copies[region]
            if len(copies) == time:
                copies.append(Region(region.name, self.regions))
                self.regions += 1
            made.meta["region"] = copies[time]

    def fresh(self, name: str, time: int) -> str:
        found = f"{name}_{time}"
        while found in self.names:
            found += "_"
        self.names.add(found)
        return found

    def weight_name(self, name: str, shift: int) -> str:
        for prefix in self.prefixes:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdecimal():
                return f"{prefix}{int(number) + shift}{dot}{rest}"
        return name

    def replaced(self, value: Any, carried: Iterator[Node | None]) -> Any:
        """An argument with each operand read, or taken from the period before."""
        if isinstance(value, (list, tuple)):
            return [self.replaced(item, carried) for item in value]
        other = next(carried)
        return other if other is not None else self.made[value] if isinstance(value, Node) else value


def _windows(graph: Graph, fold: Fold) -> tuple[list[Node], list[Node]]:
    """The nodes from the attention of the third last period on, and from that of the second last."""
    calls = list(graph.calls())
    attention = [place for place, node in enumerate(calls) if op_name(node.target) in _ATTENTION]
    step = sum(_layer(calls[place].name) >= fold.traced - fold.period for place in attention)
    if step == 0 or len(attention) < 3 * step:
        raise NotPeriodic("the layers do not attend in turn")
    first, second, third = (attention[-count * step] for count in (3, 2, 1))
    if second - first != third - second:
        raise NotPeriodic(f"{calls[first].name} and {calls[second].name} are followed by different work")
    return calls[first:second], calls[second:third]


def _regions(graph: Graph) -> set[Region]:
    return {node.meta["region"] for node in graph.calls() if node.meta.get("region") is not None}


def _layer(name: str) -> int:
    """The layer that a value is named after; -1 if none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _shifted(text: str, shift: int) -> str:
    return _LAYER.sub(lambda found: f"l{int(found[1]) + shift}_", text)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
