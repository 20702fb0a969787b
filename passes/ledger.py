"""The account of what each pass did: sites changed, and sites refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    """A site where a rule's pattern fits but the rule was not applied."""

    site: str
    why: str


@dataclass
class PassReport:
    """What one pass did. ``fused`` names the values it made or changed."""

    name: str
    fused: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    milliseconds: float = 0.0

    @property
    def found(self) -> int:
        return len(self.fused) + len(self.refused)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "pass": self.name,
            "found": self.found,
            "fused": list(self.fused),
            "refused": [{"site": item.site, "why": item.why} for item in self.refused],
            "milliseconds": round(self.milliseconds, 3),
        }
