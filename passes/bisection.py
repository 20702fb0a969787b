"""Find the one application of a pass that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ..ir.graph import Graph
from .ledger import PassReport
from .pipeline import apply


@dataclass
class _Sites(PassReport):
    """A report that remembers the site of each application."""

    sites: list[str] = field(default_factory=list)

    def allows(self, site: str) -> bool:
        self.sites.append(site)
        return super().allows(site)


def first_wrong(
    graph: Graph, report: PassReport, is_wrong: Callable[[int], bool], default: str
) -> tuple[int | None, str]:
    """The number and the site of the application that breaks a pass; no number if the pass does not count what it does.

    Args:
        graph: what the pass runs on. report: of a run that was wrong; its name and what was switched off count.
        is_wrong: whether the pass is still wrong if no more than that many applications are made.
        default: the site to name without a number.
    """
    whole = _Sites(report.name, off=report.off)
    with suppress(Exception):  # a pass that fails has counted what it did until then
        apply(report.name, graph, whole)
    low, high = 0, whole.applications  # `low` applications are right, `high` are wrong
    if not high or is_wrong(0):
        return None, default
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_wrong(middle) else (middle, high)
    return low, whole.sites[low]
