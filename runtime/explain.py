"""Answers "why is this not fused?": each refused site and near miss, and the kernels of a layer with what ended each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from ..codegen.region import regions_of
from ..ir.dump import line_of
from ..ir.graph import Graph
from ..passes import Refusal
from .report import Report


def explain(graph: Graph, report: Report, layer: int | None = None) -> str:
    """The account of a compile in words, of one layer or of the whole model.

    For the whole model, sites that differ in nothing but the layer are shown once, with how often they occur.

    Raises:
        ValueError: the graph has no such layer.
    """
    if layer is not None and layer not in report.layer_kernels:
        raise ValueError(f"there is no layer {layer}: the model has the layers {_span(report.layer_kernels)}")
    lines: list[str] = []
    for number, entry in enumerate(report.passes, start=1):
        refused = list(_folded(_of_layer(entry.refused, layer)))
        near = list(_folded(_of_layer(entry.near, layer)))
        fused = [site for site in entry.fused if layer is None or _layer(site) == layer]
        if not (refused or near or fused):
            continue
        lines.append(
            f"{number:03d} {entry.name}: {len(fused)} fused, {_count(refused)} refused, {_count(near)} near misses"
        )
        for title, items in (("not fused", refused), ("almost", near)):
            for item, count in items:
                times = f" (and {count - 1} like it)" if count > 1 else ""
                lines.append(f"  {title}: {item.site}{times}: {item.why}")
                lines += [f"      {line}" for line in item.lines.splitlines()]
    if report.model_plan:
        lines += ["", f"the plan for several ranks {report.model_plan}"]
    lines += ["", *(_layers(report) if layer is None else _kernels(graph, layer))]
    return "\n".join(lines) + "\n"


def _kernels(graph: Graph, layer: int) -> Iterator[str]:
    """The kernels of one layer with their lines."""
    for view in regions_of(graph):
        if _layer(view.nodes[-1].name) == layer:
            yield f'kernel "{view.region.name}"'
            yield from (f"    {line_of(node)}" for node in view.nodes)


def _layers(report: Report) -> Iterator[str]:
    """The kernels of all layers by name; neighbouring layers with the same ones share a line."""
    for names, group in groupby(report.layer_kernels.items(), key=lambda item: item[1]):
        layers = [layer for layer, _ in group]
        yield f"layers {_span(layers)}: {len(names)} kernels each: {', '.join(names)}"


def _of_layer(items: Iterable[Refusal], layer: int | None) -> list[Refusal]:
    return [item for item in items if layer is None or _layer(item.site) == layer]


def _folded(items: Iterable[Refusal]) -> Iterator[tuple[Refusal, int]]:
    """The items that differ in more than numbers, with how many there are of each kind."""
    kinds: dict[tuple[str, str], list[Refusal]] = {}
    for item in items:
        kinds.setdefault((_plain(item.site), _plain(item.why)), []).append(item)
    yield from ((group[0], len(group)) for group in kinds.values())


def _plain(text: str) -> str:
    """Value names without their layer and number."""
    return re.sub(r"\bl\d+_|_\d+\b", "", text)


def _layer(name: str) -> int | None:
    found = re.match(r"l(\d+)_", name)
    return int(found[1]) if found else None


def _count(items: Iterable[tuple[Refusal, int]]) -> int:
    return sum(count for _, count in items)


def _span(layers: Iterable[int]) -> str:
    known = sorted(layers)
    return f"{known[0]} to {known[-1]}" if known else "none"
