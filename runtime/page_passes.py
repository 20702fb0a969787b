"""The passes as plain data for the page: what each changed, side by side, and what it refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from ..passes import PASSES, PassReport, Rule
from .folding import Chunk, Fold, without_numbers

_CONTEXT = 2

# A row of a side-by-side text: a line of the left and of the right, None where one has no such line; or one for both.
Row = tuple[str | None, str | None] | tuple[str]


def pass_data(report: PassReport, diff: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """One pass. Sites that differ in the layer alone are told once, with their number."""
    passed = PASSES.get(report.name)
    sites = [(item.site, item.why) for item in report.refused]
    return {
        "name": report.name,
        "doc": passed.doc if isinstance(passed, Rule) else inspect.getdoc(passed) if passed else "",
        "milliseconds": round(report.milliseconds, 2),
        "found": report.found,
        "fused": len(report.fused),
        "refused": len(report.refused),
        "sites": [{"site": site, "count": count} for (site,), count in _alike([(site,) for site in report.fused])],
        "reasons": [{"site": site, "why": why, "count": count} for (site, why), count in _alike(sites)],
        "diff": diff,
    }


def _alike(items: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """The first of those that are equal without their numbers, and how many there are."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for item in items:
        found.setdefault(tuple(map(without_numbers, item)), []).append(item)
    return [(same[0], len(same)) for same in found.values()]


def compare(before: Sequence[Chunk], after: Sequence[Chunk]) -> list[dict[str, Any]]:
    """What changed between two graphs, part by part: ``title`` and ``hunks`` of rows. Equal changes are shown once."""
    old, new = ({chunk.place: chunk for chunk in chunks} for chunks in (before, after))
    changes: dict[Any, list[int | str]] = {}
    for place in dict.fromkeys([*old, *new]):
        left, right = (chunks.get(place, Chunk(place)) for chunks in (old, new))
        changes.setdefault((left.key, right.key), []).append(place)
    found = []
    for places in changes.values():
        left, right = (chunks.get(places[0], Chunk(places[0])) for chunks in (old, new))
        hunks = list(side_by_side(*([text for text, *_ in chunk.lines()] for chunk in (left, right))))
        if hunks:
            found.append({"title": Fold([Chunk(place) for place in places]).title, "hunks": hunks})
    return found


def side_by_side(before: Sequence[str], after: Sequence[str]) -> Iterator[list[Row]]:
    """The changed stretches of two texts with a little around them. A line moved to the right is no change."""
    matcher = SequenceMatcher(None, [text.strip() for text in before], [text.strip() for text in after], autojunk=False)
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        rows: list[Row] = []
        for kind, i, i_end, j, j_end in group:
            if kind == "equal":
                rows += [(old,) if old == new else (old, new) for old, new in zip(before[i:i_end], after[j:j_end])]
            else:
                rows += _paired(before[i:i_end], after[j:j_end])
        yield rows


def _paired(before: Sequence[str], after: Sequence[str]) -> Iterator[Row]:
    """Lines side by side that define the same value, the others alone."""
    names, done = [_defined(text) for text in after], 0
    for text in before:
        name = _defined(text)
        if name in names[done:]:
            at = names.index(name, done)
            yield from ((None, line) for line in after[done:at])
            yield text, after[at]
            done = at + 1
        else:
            yield text, None
    yield from ((None, line) for line in after[done:])


def _defined(text: str) -> str:
    return text.strip().partition(":")[0]
