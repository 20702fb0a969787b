"""Which passes, and which single applications of them, are switched off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .registry import UnknownPassError


@dataclass(frozen=True)
class Switches:
    """``numbers`` are passes by their number in the dumps, ``names`` by name, ``sites`` applications of a pass by number."""

    numbers: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    sites: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def whole(self, number: int, name: str) -> bool:
        """Whether the pass of that number and name does not run at all."""
        return number in self.numbers or name in self.names

    def applications(self, name: str) -> frozenset[int]:
        """The applications of a pass that are not made."""
        return self.sites.get(name, frozenset())


def switches(entries: Iterable[str | int], known: Iterable[str]) -> Switches:
    """Read ``"FuseRope"`` (a pass), ``17`` (the pass that wrote dump 017) and ``"FuseRope#3"`` (one application, from 0).

    Raises:
        UnknownPassError: an entry names no pass.
    """
    known = set(known)
    numbers: set[int] = set()
    names: set[str] = set()
    sites: dict[str, frozenset[int]] = {}
    for entry in entries:
        if isinstance(entry, int) or entry.isdecimal():
            numbers.add(int(entry))
            continue
        match = re.fullmatch(r"(\w+)(?:#(\d+))?", entry.strip())
        if match is None or match[1] not in known:
            raise UnknownPassError(f"skip: {entry!r} is no pass, no number of one, and no PASS#APPLICATION")
        if match[2] is None:
            names.add(match[1])
        else:
            sites[match[1]] = sites.get(match[1], frozenset()) | {int(match[2])}
    return Switches(frozenset(numbers), frozenset(names), sites)
