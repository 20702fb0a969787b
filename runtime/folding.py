"""Layers of a graph: told apart, compared with the layer number taken out, and equal ones shown as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir.dump import INDENT, line_of
from ..ir.graph import Graph, Region, is_constant
from ..ir.ops import op_name
from ..ir.period import LAYER_ARGUMENT
from ..ir.types import type_text

_ATTENTION = frozenset({"nn.attention", "nn.paged_attention"})

# A selection states its layer if it takes each layer its part of a common value.
_LAYER_ARGUMENT = {**LAYER_ARGUMENT, "aten.select.int": 2}


@dataclass
class Chunk:
    """A stretch of a graph: one layer, or what stands before the first (``start``) or after the last (``end``); ``all``
    is a graph without layers.

    ``key`` is equal for layers that do the same: it holds no names of their values and no layer number.
    """

    place: int | str
    nodes: list[Node] = field(default_factory=list)
    key: tuple[Any, ...] = ()

    def lines(self) -> Iterator[tuple[str, Node, bool]]:
        """The text, as it stands in a dump, with the value of each line; or, if true, a kernel's head and first value."""
        region: Region | None = None
        for node in self.nodes:
            inside: Region | None = node.meta.get("region")
            if inside is not None and inside != region:
                yield f'with kernel("{inside.name}"):', node, True
            region = inside
            yield (INDENT if inside else "") + line_of(node), node, False


@dataclass
class Fold:
    """Chunks that are equal. The first stands for all."""

    members: list[Chunk]

    @property
    def shown(self) -> Chunk:
        return self.members[0]

    @property
    def title(self) -> str:
        place = self.shown.place
        if not isinstance(place, int):
            return {"start": "before the layers", "end": "after the layers", "all": "the graph"}[place]
        if len(self.members) == 1:
            return f"layer {place}"
        return f"layers {spans_text(self.layers)} ({len(self.members)} equal)"

    @property
    def layers(self) -> list[int]:
        return [chunk.place for chunk in self.members if isinstance(chunk.place, int)]


def split(graph: Graph) -> list[Chunk]:
    """Cut a graph into its layers, in order.

    A layer begins where a computed value is the first with its number in the name (``l12_...``), once the attention of
    the layer before has been seen: other lists of modules count too. The weights right before it are its own, and
    kernels are never cut.
    """
    chunks = [Chunk("start")]
    waiting: list[Node] = []
    closed = plain = not any(op_name(node.target) in _ATTENTION for node in graph.calls())
    last = 0  # how much of the newest layer has been seen when its number was met for the last time
    for region, group in groupby(graph.calls(), lambda node: node.meta.get("region")):
        for nodes in [list(group)] if region is not None else [[node] for node in group]:
            if region is None and (is_constant(nodes[0]) or str(nodes[0].target) == "cache"):
                waiting += nodes
                continue
            newest, layer = chunks[-1].place, max(map(_number, nodes))
            if layer >= 0 and (not isinstance(newest, int) or (layer > newest and closed)):
                chunks.append(Chunk(layer))
                closed = plain
            chunks[-1].nodes += waiting + nodes
            waiting = []
            closed = closed or any(op_name(node.target) in _ATTENTION for node in nodes)
            if layer == chunks[-1].place:
                last = len(chunks[-1].nodes)
    chunks[-1].nodes += waiting
    if len(chunks) > 1:
        chunks.append(Chunk("end", chunks[-1].nodes[last:]))
        del chunks[-2].nodes[last:]
    else:
        chunks[0].place = "all"
    _set_keys(chunks)
    return [chunk for chunk in chunks if chunk.nodes]


def fold(chunks: Iterable[Chunk]) -> list[Fold]:
    """Equal chunks together, in the order of the first of each."""
    found: dict[tuple[Any, ...], Fold] = {}
    for chunk in chunks:
        found.setdefault(chunk.key, Fold([])).members.append(chunk)
    return list(found.values())


def spans_text(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: ``1-4, 6-9``, or ``1, 3, ..., 79`` where one is left out each time."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, \N{HORIZONTAL ELLIPSIS}, {numbers[-1]}"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [f"{low}" if low == high else f"{low}-{high}" for low, high in spans]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:4], "\N{HORIZONTAL ELLIPSIS}", texts[-1]])


def without_numbers(text: str) -> str:
    """A text in which layers and the counters of names are left open: equal for the same site of other layers."""
    return re.sub(r"\b([A-Za-z]\w*?)_\d+\b", r"\1_#", re.sub(r"\bl\d+_", "l#_", text))


def _number(node: Node) -> int:
    """The layer in a value's name; -1 if there is none."""
    found = re.match(r"l(\d+)_", node.name)
    return int(found[1]) if found else -1


def _set_keys(chunks: Sequence[Chunk]) -> None:
    places = {node: (at, index) for at, chunk in enumerate(chunks) for index, node in enumerate(chunk.nodes)}
    # A value of one layer that many read is the same one for all of them, not one of the layer before.
    common = {node for node in places if len({places.get(user, (-1, 0))[0] for user in node.users}) > 2}
    for at, chunk in enumerate(chunks):
        if not isinstance(chunk.place, int):
            chunk.key = (chunk.place,)
            continue

        def reference(node: Node, at: int = at) -> tuple[int | str, int]:
            """A value by where it stands: in this layer, or so many layers before, counted from that layer's end."""
            other, index = places.get(node, (-1, 0))
            if other == at:
                return 0, index
            if other >= 0 and isinstance(chunks[other].place, int) and node not in common:
                return at - other, index - len(chunks[other].nodes)
            return node.name, 0

        regions: dict[Region, int] = {}
        lines: list[Any] = []
        for node in chunk.nodes:
            region: Region | None = node.meta.get("region")
            kernel = (region.name, regions.setdefault(region, len(regions))) if region else None
            arguments = [map_arg(_unnumbered(node, chunk.place, common), reference), map_arg(node.kwargs, reference)]
            kind, source = type_text(node.meta["type"]), node.meta.get("source")
            lines.append((kernel, kind, op_name(node.target), repr(arguments), source))
        chunk.key = tuple(lines)


def _unnumbered(node: Node, layer: int, common: set[Node]) -> tuple[Any, ...]:
    """The arguments of a node with its layer's number taken out."""
    arguments = list(node.args)
    name = op_name(node.target)
    if name == "weight":
        relative = re.sub(r"(?:^|\.)(\d+)\.", lambda found: f".#{int(found[1]) - layer}.", str(arguments[0]), count=1)
        arguments[0] = relative
    elif name in _LAYER_ARGUMENT and (name != "aten.select.int" or arguments[0] in common):
        at = _LAYER_ARGUMENT[name]
        arguments[at] = "#" if arguments[at] == layer else arguments[at]
    return tuple(arguments)
