"""All ranks of a partitioned graph in one process: each an executor of its own, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .executor import Executor
from .groups import Meeting
from .step import StepInput


class SimulatedRanks:
    """Runs each step on the executors of all ranks, which meet in ``meeting``. The logits are those of the first, or of all
    next to each other if each has some of the columns (``in_parts``)."""

    def __init__(self, executors: Sequence[Executor], meeting: Meeting, in_parts: bool = False) -> None:
        self._executors = list(executors)
        self._in_parts = in_parts
        self._meeting = meeting
        self._threads = ThreadPoolExecutor(len(self._executors), "rank")

    def __call__(self, step: StepInput, out: Tensor | None = None) -> Tensor:
        """The logits; see ``Executor``.

        An exception of one rank is raised when all have stopped, with a note that names the rank.
        """
        found = self.all(step, None if self._in_parts else out)
        return torch.cat(found, 1) if self._in_parts else found[0]

    def all(self, step: StepInput, out: Tensor | None = None) -> list[Tensor]:
        """The logits of every rank."""

        def run(rank: int) -> Tensor:
            try:
                return self._executors[rank](step, out if rank == 0 else None)
            except Exception as error:
                error.add_note(f"on rank {rank} of {len(self._executors)}")
                self._meeting.leave()
                raise

        running = [self._threads.submit(run, rank) for rank in range(len(self._executors))]
        failed = [error for error in [item.exception() for item in running] if error is not None]
        if failed:
            self._meeting.reopen()
            # The others only say that a rank did not come.
            raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
        return [item.result() for item in running]

    def into(self, step: StepInput, logits: Tensor) -> None:
        """Write the logits of ``step.rows`` to ``logits``."""
        found = self(step, logits)
        if found is not logits:
            logits.copy_(found)

    def poisoned(self) -> SimulatedRanks:
        """The same with the caches of all ranks poisoned."""
        for executor in self._executors:
            executor.poisoned()
        return self
