"""The page: everything a dump holds in one HTML file that needs no network, to look at and click through."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from ..codegen.kernels import Kernel
from ..ir.graph import Graph
from .excerpts import Excerpts
from .folding import Chunk, split
from .page_graph import FoldedGraph
from .page_passes import compare, pass_data
from .report import Report

_SCRIPTS = ("dom.js", "drawing.js", "graph.js", "passes.js", "panel.js", "search.js", "main.js")


class Page:
    """Collects the graph after every pass; ``html`` makes the page of it."""

    def __init__(self) -> None:
        self._diffs: list[list[dict[str, Any]]] = []
        self._last: tuple[Graph, list[Chunk]] | None = None

    def add(self, graph: Graph, changed: bool = True) -> None:
        """Note the graph as captured, then as it is after each pass."""
        chunks = split(graph) if changed or self._last is None else self._last[1]
        if self._last is not None:
            self._diffs.append(compare(self._last[1], chunks) if changed else [])
        self._last = graph, chunks

    def data(self, kernels: Sequence[Kernel], report: Report) -> dict[str, Any]:
        """All that the page shows, as plain data."""
        assert self._last is not None
        graph = FoldedGraph(self._last[0], kernels).data()
        known = len(self._diffs) == len(report.passes)  # a model that is dumped later has lost its steps
        diffs: Sequence[Any] = self._diffs if known else [None] * len(report.passes)
        found = {
            "model": report.model,
            "facts": report.rows(),
            "passes": [pass_data(entry, diff) for entry, diff in zip(report.passes, diffs)],
            "graph": graph,
            "kernels": {kernel.name: {"source": kernel.source, "calls": len(kernel.regions)} for kernel in kernels},
        }
        excerpts = Excerpts()
        excerpts.add(json.dumps(found))
        return {**found, "sources": excerpts.data()}

    def html(self, kernels: Sequence[Kernel], report: Report) -> str:
        """The page as one file."""
        return page_of(self.data(kernels, report))


def page_of(data: dict[str, Any]) -> str:
    """The page around plain data. The data is text to show, never markup or code."""
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    parts = {
        # No request leaves the page, and nothing runs but what came with it.
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _inert(json.dumps(data, separators=(",", ":"))),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def _inert(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return re.sub(r"[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
