"""The lowered graph as plain data for the page: its text by layer, every value, and a drawing of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..codegen.kernels import Kernel
from ..ir.dump import signature, value_text
from ..ir.graph import Graph, Region, is_constant
from ..ir.ops import op_name
from ..ir.types import type_text
from .drawing import layout
from .excerpts import REFERENCE
from .folding import Fold, fold, split

# A drawing of more values than this cannot be read; the text is shown alone.
_MOST_DRAWN = 160
_CHAR, _ROW, _HEAD, _PAD, _MARGIN = 6.65, 17.0, 24.0, 10.0, 26.0


class FoldedGraph:
    """A graph in which equal layers are shown once. Every value of a hidden layer is spoken of by the one shown."""

    def __init__(self, graph: Graph, kernels: Sequence[Kernel]) -> None:
        self.graph = graph
        self.chunks = split(graph)
        self.folds = fold(self.chunks)
        self.kernel_of = {region: kernel.name for kernel in kernels for region in kernel.regions}
        self.place = {node: chunk.place for chunk in self.chunks for node in chunk.nodes}
        self.shown = {
            node: twin
            for item in self.folds
            for chunk in item.members
            for node, twin in zip(chunk.nodes, item.shown.nodes)
        }
        self._users: dict[Node, Counter[Node]] = {}
        for node in [*graph.inputs(), *graph.calls()]:
            counted = self._users.setdefault(self.shown.get(node, node), Counter())
            counted.update(self.shown.get(user, user) for user in node.users)

    def data(self) -> dict[str, Any]:
        """Plain data: ``parts`` (text and drawing), ``values`` by name, ``aliases`` of values in hidden layers."""
        aliases: dict[str, str] = {}
        for item in self.folds:
            for node in item.shown.nodes:
                for source in node.all_input_nodes:
                    twin = self.shown.get(source, source)
                    if twin is not source:
                        aliases[source.name] = twin.name
        result = self.graph.output_node().args[0]
        if isinstance(result, Node) and self.shown.get(result, result) is not result:
            aliases[result.name] = self.shown[result].name
        return {
            "signature": signature(self.graph),
            "result": f"return {value_text(result)}",
            "parts": [self._part(item) for item in self.folds],
            "values": dict(self._values()),
            "aliases": aliases,
        }

    def _part(self, item: Fold) -> dict[str, Any]:
        lines = [
            [text, None if head else node.name, self.kernel_of.get(node.meta["region"]) if head else None]
            for text, node, head in item.shown.lines()
        ]
        return {
            "title": item.title,
            "layers": item.layers,
            "lines": lines,
            "drawing": _Sketch(self, item).data(),
        }

    def _values(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for node in self.graph.inputs():
            yield node.name, {"type": type_text(node.meta["type"]), "users": self._user_names(node)}
        for part, item in enumerate(self.folds):
            for line, (_, node, head) in enumerate(item.shown.lines()):
                if not head:
                    yield node.name, {**self._value(node), "part": part, "line": line}

    def _value(self, node: Node) -> dict[str, Any]:
        region: Region | None = node.meta.get("region")
        notes = [note for note in str(node.meta.get("source") or "").split("; ") if note]
        return {
            "type": type_text(node.meta["type"]),
            "op": op_name(node.target),
            "kernel": self.kernel_of.get(region) if region else None,
            "rules": [note for note in notes if not REFERENCE.fullmatch(note)],
            "source": next((note for note in notes if REFERENCE.fullmatch(note)), None),
            "users": self._user_names(node),
        }

    def _user_names(self, node: Node) -> list[tuple[str, int]]:
        return [(user.name, count) for user, count in self._users[node].items() if user.op != "output"]

    def readers(self, node: Node, item: Fold) -> list[str]:
        """Where a value of a part is read outside of it, over all layers that the part stands for."""
        index = item.shown.nodes.index(node)
        found: dict[str, None] = {}
        for chunk in item.members:
            for user in chunk.nodes[index].users:
                if user.op == "output":
                    found["the result"] = None
                elif (place := self.place[user]) != chunk.place:
                    found[_direction(chunk.place, place)] = None
        return list(found)


def _direction(here: int | str, there: int | str) -> str:
    if not isinstance(there, int):
        return "after the layers"
    if not isinstance(here, int):
        return "the layers"
    return "the next layer" if there == here + 1 else "later layers"


@dataclass
class _Box:
    kind: str
    title: str | None
    nodes: list[Node]
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def columns(self) -> list[float]:
        """Where the columns of the rows begin, and where the last ends."""
        left = [_MARGIN if self.title else _PAD]
        for texts in zip(*self.rows):
            widest = max(map(len, texts))
            left.append(left[-1] + (_CHAR * (widest + 2) if widest else 0.0))
        left[-1] -= 2 * _CHAR
        return left

    def size(self) -> tuple[float, float]:
        head = _CHAR * (len(self.title) + 9) + 2 * _PAD if self.title else 0.0
        return round(max(self.columns()[-1] + _PAD, head), 1), (_HEAD if self.title else 6.0) + _ROW * len(
            self.rows
        ) + 6.0


class _Sketch:
    """The boxes of one part: what comes in, a kernel each, values outside of kernels, and what goes out."""

    def __init__(self, folded: FoldedGraph, item: Fold) -> None:
        self.drawn = [node for node in item.shown.nodes if not is_constant(node) and str(node.target) != "cache"]
        kernels: list[_Box] = []
        for node in self.drawn:
            region: Region | None = node.meta.get("region")
            last = kernels[-1] if kernels else None
            if last and region is not None and last.nodes[-1].meta.get("region") == region:
                last.nodes.append(node)
                last.rows.append(_row(node))
            elif region is not None:
                kernels.append(_Box("kernel", folded.kernel_of.get(region, region.name), [node], [_row(node)]))
            else:
                kernels.append(_Box("value", None, [node], [_row(node)]))
        self.boxes = [*_inputs(kernels), *kernels]
        self.owner = {node: at for at, box in enumerate(self.boxes) for node in box.nodes}
        self.outputs: dict[int, Node] = {}
        for node in self.drawn:
            if readers := folded.readers(node, item):
                self.outputs[len(self.boxes)] = node
                row = (node.name, f"\N{RIGHTWARDS ARROW} {', '.join(readers)}", "")
                self.boxes.append(_Box("output", None, [node], [row]))

    def _edges(self) -> dict[tuple[int, int], list[str]]:
        """The values that go from box to box."""
        found: dict[tuple[int, int], list[str]] = {}
        for node in self.drawn:
            for source in node.all_input_nodes:
                pair = self.owner.get(source, -1), self.owner[node]
                if pair[0] >= 0 and pair[0] != pair[1]:
                    found.setdefault(pair, []).append(source.name)
        for at, sent in self.outputs.items():
            found.setdefault((self.owner[sent], at), []).append(sent.name)
        return found

    def _arcs(self, box: _Box) -> list[tuple[int, int]]:
        """Which rows of a kernel read which."""
        at = {node: row for row, node in enumerate(box.nodes)}
        return [(at[source], at[node]) for node in box.nodes for source in node.all_input_nodes if source in at]

    def data(self) -> dict[str, Any] | None:
        if not self.drawn or len(self.drawn) > _MOST_DRAWN:
            return None
        edges = self._edges()
        drawing = layout([box.size() for box in self.boxes], list(edges))
        return {
            "width": round(drawing.width, 1),
            "height": round(drawing.height, 1),
            "boxes": [
                {
                    "x": x,
                    "y": y,
                    "size": box.size(),
                    "kind": box.kind,
                    "kernel": box.title,
                    "columns": [round(left, 1) for left in box.columns()],
                    "rows": [[node.name, *row] for node, row in zip(box.nodes, box.rows)],
                    "arcs": self._arcs(box),
                }
                for box, (x, y) in zip(self.boxes, drawing.corners)
            ],
            "edges": [
                {"from": source, "to": target, "values": sorted(set(values)), "path": path}
                for ((source, target), values), path in zip(edges.items(), drawing.routes)
            ],
        }


def _inputs(kernels: Sequence[_Box]) -> list[_Box]:
    """What comes from outside; values that go to the same places share a box."""
    inside = {node for box in kernels for node in box.nodes}
    readers: dict[Node, list[int]] = {}
    for at, box in enumerate(kernels):
        for source in (source for node in box.nodes for source in node.all_input_nodes):
            if source not in inside and not is_constant(source) and at not in readers.setdefault(source, []):
                readers[source].append(at)
    together: dict[tuple[int, ...], _Box] = {}
    for source, places in readers.items():
        box = together.setdefault(tuple(places), _Box("input", None, []))
        box.nodes.append(source)
        box.rows.append((source.name, type_text(source.meta["type"]), ""))
    return list(together.values())


def _row(node: Node) -> tuple[str, str, str]:
    return node.name, op_name(node.target).removeprefix("aten."), type_text(node.meta["type"])
