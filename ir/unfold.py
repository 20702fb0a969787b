"""A folded graph made whole: the layer that stands for many is repeated, each time with weights and caches of its own."""

from __future__ import annotations

from functools import cached_property

from torch.fx import Node

from .graph import Graph, Region
from .period import LAYER_ARGUMENT, Period, fold_of, layer_of, regions_in, shifted, substituted


class Unfolded:
    """A graph with all layers of the model, written out when ``graph`` is asked for: that takes a millisecond a layer.

    ``folded`` is the graph as it was given and ``period`` what is repeated in it; nothing, if that is whole already.
    ``copies`` are the kernel regions of ``graph`` that each region of ``folded`` becomes.
    """

    def __init__(self, folded: Graph) -> None:
        self.folded = folded
        fold = fold_of(folded)
        self.period = Period(folded, fold) if fold else None
        regions = regions_in(folded)
        self.copies = {region: [region] for region in regions}
        if self.period:
            repeated = dict.fromkeys(node.meta["region"] for node in self.period.nodes if node.meta.get("region"))
            index = 1 + max((region.index for region in regions), default=0)
            for _ in range(1, self.period.times):
                for region in repeated:
                    self.copies[region].append(Region(region.name, index))
                    index += 1

    @property
    def step(self) -> int:
        """How many layers each time is further on than the one before."""
        return self.period.fold.period if self.period else 0

    @cached_property
    def graph(self) -> Graph:
        """The whole graph; the given one, if it is not folded."""
        return _Writer(self.folded, self.period, self.copies).run() if self.period else self.folded

    def stages(self) -> list[tuple[list[Node], range]]:
        """The nodes of ``folded`` in order, with the times at which they are done: before the period, in it, after it."""
        nodes = list(self.folded.nodes)
        if not self.period:
            return [(nodes, range(1))]
        begin, last = nodes.index(self.period.nodes[0]), self.period.times - 1
        end = begin + len(self.period.nodes)
        return [(nodes[:begin], range(1)), (nodes[begin:end], range(last + 1)), (nodes[end:], range(last, last + 1))]


def unfold(graph: Graph) -> Unfolded:
    """The whole graph, to be written out when it is needed.

    Raises:
        NotPeriodic: the layers that stand for others are not alike.
    """
    return Unfolded(graph)


class _Writer:
    def __init__(self, old: Graph, period: Period, copies: dict[Region, list[Region]]) -> None:
        self.old = old
        self.period = period
        self.copies = copies
        options = {name: value for name, value in old.options.items() if not name.startswith("fold_")}
        self.new = Graph(old.name, old.dims, options)
        self.made: dict[Node, Node] = {}
        self.names = {node.name for node in old.nodes}

    def run(self) -> Graph:
        time, last = 0, self.period.nodes[-1]
        for node in self.old.nodes:
            self.add(node, time, [])
            if node is last:
                for time in range(1, self.period.times):
                    before = {item: self.made[item] for item in self.period.nodes}
                    for item in self.period.nodes:
                        self.add(item, time, [source and before[source] for source in self.period.carried[item]])
        return self.new

    def add(self, node: Node, time: int, carried: list[Node | None]) -> None:
        """Add a node, moved on by ``time`` periods; ``carried`` are its operands from the period before."""
        if not any(carried):
            made = self.new.node_copy(node, self.made.__getitem__)
        else:
            operands = iter(carried)
            arguments = tuple(substituted(item, operands, self.made) for item in node.args)
            made = self.new.call_function(node.target, arguments, dict(node.kwargs))  # type: ignore[arg-type]
        self.made[node] = made
        made.name, made.meta = node.name, dict(node.meta)
        if time and node.op == "call_function":
            self.move(made, node, time)

    def move(self, made: Node, node: Node, time: int) -> None:
        """Give a node the weights, caches, name and region that it has ``time`` periods later."""
        if str(node.target) == "weight":
            made.args = (self.period.weight(node, time),)
        elif str(node.target) in LAYER_ARGUMENT:
            place, layer = LAYER_ARGUMENT[str(node.target)], self.period.layer(node, time)
            made.args = (*made.args[:place], layer, *made.args[place + 1 :])
            made.name = f"{node.args[0]}_cache_{layer}" if str(node.target) == "cache" else node.name
        if layer_of(node.name) >= 0:
            made.name = shifted(node.name, time * self.period.fold.period)
        if node in self.period.pair:
            if made.name == node.name:
                made.name = self.fresh(node.name, time)
            if node.meta.get("region") is not None:
                made.meta["region"] = self.copies[node.meta["region"]][time]

    def fresh(self, name: str, time: int) -> str:
        found = f"{name}_{time}"
        while found in self.names:
            found += "_"
        self.names.add(found)
        return found
