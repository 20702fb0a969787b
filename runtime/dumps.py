"""Dumps: the text after every pass as numbered files, what each pass changed, the kernels, the report."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..codegen.kernels import Kernel
from ..ir.dump import dump
from ..ir.graph import Graph
from .report import Report


class Dump:
    """Writes ``000_capture.txt``, ``NNN_PassName.txt`` with ``.diff`` beside it, ``kernels/*.py``, and the report.

    Files of the same names are replaced; nothing else in the directory is touched.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._last = ""

    def restart(self) -> None:
        """Begin again with number 000; the files written so far are replaced."""
        self._count = 0

    def graph(self, name: str, graph: Graph) -> None:
        """Write the graph as it is after the pass of that name."""
        text, stem = dump(graph), f"{self._count:03d}_{name}"
        (self.directory / f"{stem}.txt").write_text(text)
        if self._count:
            lines = difflib.unified_diff(
                self._last.splitlines(), text.splitlines(), "before", "after", lineterm="", n=2
            )
            (self.directory / f"{stem}.diff").write_text("\n".join(lines) + "\n")
        self._count += 1
        self._last = text

    def finish(self, kernels: Sequence[Kernel], report: Report) -> None:
        """Write the kernels and the report."""
        folder = self.directory / "kernels"
        folder.mkdir(exist_ok=True)
        for kernel in kernels:
            (folder / f"{kernel.name}.py").write_text(kernel.source)
        (self.directory / "report.txt").write_text(str(report))
        (self.directory / "report.json").write_text(report.as_json() + "\n")
