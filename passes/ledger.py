"""The account of what each pass did: sites changed, sites refused with the reason, and sites that almost fitted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch.fx import Node

from ..ir.fold import Fold
from ..ir.period import spread
from ..ir.verify import excerpt

Item = TypeVar("Item")


@dataclass(frozen=True)
class Refusal:
    """A site where a pass could have applied and did not.

    ``why`` is the first thing that stood in the way; ``lines`` are the graph lines around the node where it stood.
    """

    site: str
    why: str
    lines: str = ""

    def __str__(self) -> str:
        return f"{self.site}: {self.why}" + (f"\n{self.lines}" if self.lines else "")


@dataclass
class PassReport:
    """What one pass did. ``fused`` names the values it made or changed, in the order of its applications.

    ``near`` are near misses: sites where most of a pattern fits. ``off`` are the numbers of applications that are not
    to be made, and ``limit`` the number of the first one after which none is.
    """

    name: str
    fused: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    near: list[Refusal] = field(default_factory=list)
    milliseconds: float = 0.0
    off: frozenset[int] = frozenset()
    limit: int | None = None
    applications: int = 0

    @property
    def found(self) -> int:
        return len(self.fused) + len(self.refused)

    def allows(self, site: str) -> bool:
        """Whether the next application, at this site, is to be made; to be asked once for each, just before it.

        One that is switched off is noted as refused.
        """
        number = self.applications
        self.applications += 1
        if number in self.off or (self.limit is not None and number >= self.limit):
            self.refused.append(Refusal(site, f"switched off (application {number} of {self.name})"))
            return False
        return True

    def refuse(self, site: str, why: str, node: Node | None = None) -> None:
        """Note a refused site; ``node`` is what stood in the way."""
        self.refused.append(Refusal(site, why, excerpt(node) if node is not None else ""))

    def spread(self, fold: Fold) -> PassReport:
        """The account of the whole model, from that of its folded graph."""

        def of(items: list[Refusal]) -> list[Refusal]:
            return [Refusal(*texts) for item in items for texts in spread(item.site, fold, item.why, item.lines)]

        fused = [name for site in self.fused for (name,) in spread(site, fold)]
        return replace(self, fused=fused, refused=of(self.refused), near=of(self.near))

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "pass": self.name,
            "found": self.found,
            "fused": list(self.fused),
            "refused": [_refusal(item) for item in self.refused],
            "near_misses": [_refusal(item) for item in self.near],
            "milliseconds": round(self.milliseconds, 3),
        }


class Applies(Exception):
    """Raised instead of an answer by a report that only looks: the pass has something to do."""


class Look(PassReport):
    """The report of a pass that is to find out whether there is anything to do, and to change nothing yet."""

    def allows(self, site: str) -> bool:
        raise Applies(site)


def asks_first(item: Item) -> Item:
    """Mark a pass that leaves the graph as it is until ``PassReport.allows`` has answered for the first time.

    Where such a pass has nothing to do it is given no graph of its own, and the graph after it is the one before.
    """
    item.asks_first = True  # type: ignore[attr-defined]
    return item


def _refusal(item: Refusal) -> dict[str, str]:
    return {"site": item.site, "why": item.why, "lines": item.lines}
