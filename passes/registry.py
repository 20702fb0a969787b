"""The passes by name and the order they run in; others than our own are added here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ..ir.errors import FuselineError
from ..ir.graph import Graph
from .ledger import PassReport

GraphPass = Callable[[Graph, PassReport], Graph]
"""Rewrites a graph of its own (in place, if it likes), notes what it did in the report, and returns the result.

One that is marked ``asks_first`` may be given another's graph first, under a report that stops it at its first change."""

Item = TypeVar("Item", bound=GraphPass)


class UnknownPassError(FuselineError, KeyError):
    """There is no pass of that name."""


class Registry(Mapping[str, GraphPass]):
    """Passes by name, and the pipeline: names in the order in which ``compile`` runs them, some more than once."""

    def __init__(self, passes: Mapping[str, GraphPass], pipeline: Sequence[str]) -> None:
        self._passes = dict(passes)
        self._pipeline = list(pipeline)

    @property
    def pipeline(self) -> tuple[str, ...]:
        return tuple(self._pipeline)

    def __getitem__(self, name: str) -> GraphPass:
        """Raises UnknownPassError, with the names there are."""
        if name not in self._passes:
            raise UnknownPassError(f"no pass is named {name}; there are {', '.join(self._passes)}")
        return self._passes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._passes

    def __iter__(self) -> Iterator[str]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, item: GraphPass, *, before: str | None = None, after: str | None = None) -> None:
        """Add a pass under its name (``item.name``, else ``item.__name__``), next to another one of the pipeline.

        A neighbour that runs more than once counts where it runs last.

        Raises:
            ValueError: the name is taken, or the position is not one neighbour.
            UnknownPassError: the neighbour is not in the pipeline.
        """
        name = name_of(item)
        if name in self._passes:
            raise ValueError(f"a pass named {name} exists already")
        neighbour = before or after
        if neighbour is None or (before and after):
            raise ValueError(f"{name}: say before=NAME or after=NAME, for one pass of the pipeline")
        if neighbour not in self._pipeline:
            raise UnknownPassError(f"{name}: no pass of the pipeline is named {neighbour}")
        place = len(self._pipeline) - 1 - self._pipeline[::-1].index(neighbour)
        self._passes[name] = item
        self._pipeline.insert(place if before else place + 1, name)

    def remove(self, name: str) -> None:
        """Take a pass out again."""
        del self._passes[name]
        self._pipeline = [item for item in self._pipeline if item != name]

    def register(self, *, before: str | None = None, after: str | None = None) -> Callable[[Item], Item]:
        """Decorator form of ``add``; goes above ``@rule`` or above a function."""

        def wrap(item: Item) -> Item:
            self.add(item, before=before, after=after)
            return item

        return wrap


def name_of(item: GraphPass) -> str:
    """The name of a pass."""
    return str(getattr(item, "name", None) or getattr(item, "__name__", type(item).__name__))
