"""Ranks that are threads of one process and meet at the collectives."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.dist import Group


class Meeting:
    """Where the threads of ``size`` ranks meet. Each brings something and takes what all have brought."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._brought: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What the ranks have brought, in their order. It stays theirs, and must not be written to after.

        Raises:
            threading.BrokenBarrierError: another rank will not come.
        """
        self._brought[rank] = x
        self._barrier.wait()
        found = [item for item in self._brought if item is not None]
        self._barrier.wait()
        return found

    def leave(self) -> None:
        """Let no rank wait any longer: one of them has failed."""
        self._barrier.abort()

    def reopen(self) -> None:
        """Make a meeting that was left usable again. No rank may be in it."""
        self._barrier.reset()


class SimulatedGroup:
    """One of the ranks of a meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.meeting = meeting

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, x: Tensor) -> Tensor:
        return summed(self.meeting.exchange(self.rank, x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return self.meeting.exchange(self.rank, x)


def simulated(size: int) -> list[Group]:
    """The ranks of a new meeting."""
    meeting = Meeting(size)
    return [SimulatedGroup(rank, meeting) for rank in range(size)]


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' tensors in the order of the ranks, rounded once: the same bits on every rank."""
    first, *others = parts
    wide = first.to(torch.promote_types(first.dtype, torch.float32)) if first.is_floating_point() else first.clone()
    total = wide.clone() if wide is first else wide
    for part in others:
        total += part
    return total.to(first.dtype)
