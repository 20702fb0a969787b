"""Dumps: the text after every pass as numbered files, what each pass changed, the kernels, the report, the page."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..codegen.kernels import Kernel
from ..ir.dump import dump
from ..ir.graph import Graph
from ..ir.period import NotPeriodic
from ..ir.unfold import unfold
from .page import Page
from .ranks import path_of_rank
from .report import Report


class Dump:
    """Writes ``000_capture.txt``, ``NNN_PassName.txt`` with ``.diff`` beside it, ``kernels/*.py``, the report, and
    ``index.html``, a page to look at all of it. For a path that ends with ``.html`` it writes that page alone.

    Files of the same names are replaced; nothing else in the directory is touched. Where a launcher started several
    processes, each writes to ``rank0``, ``rank1``, ... in the directory, or to ``page.rank0.html``.
    """

    def __init__(self, path: str | Path) -> None:
        self.page = path_of_rank(path)
        self.directory: Path | None = None
        if self.page.suffix != ".html":
            self.directory, self.page = self.page, self.page / "index.html"
        self.page.parent.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._last = ""
        self._page = Page()

    def restart(self) -> None:
        """Begin again with number 000; the files written so far are replaced."""
        self._count = 0
        self._page = Page()

    def graph(self, name: str, graph: Graph) -> None:
        """Write the graph as it is after the pass of that name."""
        text = dump(graph)
        self._page.add(_whole(graph), changed=text != self._last)
        if self.directory:
            self._write(self.directory / f"{self._count:03d}_{name}", text)
        self._count += 1
        self._last = text

    def _write(self, stem: Path, text: str) -> None:
        stem.with_suffix(".txt").write_text(text)
        if self._count:
            lines = difflib.unified_diff(
                self._last.splitlines(), text.splitlines(), "before", "after", lineterm="", n=2
            )
            stem.with_suffix(".diff").write_text("\n".join(lines) + "\n")

    def finish(self, kernels: Sequence[Kernel], report: Report) -> None:
        """Write the page, the kernels and the report."""
        self.page.write_text(self._page.html(kernels, report), encoding="utf-8")
        if self.directory:
            folder = self.directory / "kernels"
            folder.mkdir(exist_ok=True)
            for kernel in kernels:
                (folder / f"{kernel.name}.py").write_text(kernel.source)
            (self.directory / "report.txt").write_text(str(report))
            (self.directory / "report.json").write_text(report.as_json() + "\n")


def _whole(graph: Graph) -> Graph:
    """The graph with all layers of the model, as far as it can be unfolded between passes."""
    try:
        return unfold(graph).graph
    except NotPeriodic:
        return graph
