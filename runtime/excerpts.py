"""The lines of model code that values come from, read from the modules that are loaded or from transformers."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import transformers

REFERENCE = re.compile(r"\b(modeling_\w+\.py):(\d+)\b")

_AROUND = 4


class Excerpts:
    """Collects references such as ``modeling_llama.py:182``; ``data`` has their lines, each once."""

    def __init__(self) -> None:
        self._wanted: dict[str, set[int]] = {}

    def add(self, text: str) -> None:
        """Note every reference in a text."""
        for file, line in REFERENCE.findall(text):
            self._wanted.setdefault(file, set()).add(int(line))

    def data(self) -> dict[str, dict[str, dict[int, str]]]:
        """By file: ``lines``, those referred to with their neighbours, and ``scopes``, the function around each.

        A file that is not at hand is left out.
        """
        found: dict[str, dict[str, dict[int, str]]] = {}
        for file, numbers in self._wanted.items():
            lines = _lines(file)
            near = {at for number in numbers for at in range(number - _AROUND, number + _AROUND + 1)}
            kept = {at: lines[at - 1] for at in sorted(near) if 0 < at <= len(lines)}
            if kept:
                scopes = _scopes(file)
                found[file] = {"lines": kept, "scopes": {at: scopes.get(at, "") for at in sorted(numbers)}}
        return found


@cache
def _lines(file: str) -> tuple[str, ...]:
    """The lines of a modeling file; none if it is not at hand."""
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    places = [Path(path) for path in loaded if isinstance(path, str) and Path(path).name == file]
    places += (Path(transformers.__file__).parent / "models").glob(f"*/{file}")
    for place in places:
        try:
            return tuple(place.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError):
            continue
    return ()


@cache
def _scopes(file: str) -> dict[int, str]:
    """The function that each line is in, as ``LlamaMLP.forward``."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
                for line in range(child.lineno, (child.end_lineno or child.lineno) + 1):
                    found[line] = inner
            visit(child, inner)

    try:
        visit(ast.parse("\n".join(_lines(file))), "")
    except SyntaxError:
        return {}
    return found
