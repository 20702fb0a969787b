"""Lines of a kernel under construction."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_RESERVED = frozenset(("tl triton torch def for if in is row col and or not lambda from import as pass").split())


class Writer:
    """Collects indented lines and hands out names that are not taken."""

    def __init__(self, taken: set[str] | None = None, depth: int = 1) -> None:
        self.lines: list[str] = []
        self._taken = set(taken or ()) | _RESERVED
        self._depth = depth

    def line(self, text: str = "") -> None:
        self.lines.append("    " * self._depth + text if text else "")

    def assign(self, name: str, text: str) -> str:
        """Write ``name = text`` under a fresh name and return the name."""
        fresh = self.fresh(name)
        self.line(f"{fresh} = {text}")
        return fresh

    def fresh(self, name: str) -> str:
        base = re.sub(r"\W", "_", name)
        found, count = base, 1
        while found in self._taken:
            found, count = f"{base}_{count}", count + 1
        self._taken.add(found)
        return found

    @contextmanager
    def block(self, opening: str) -> Iterator[None]:
        """An indented block under a line such as ``for ...:``."""
        self.line(opening)
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"
