"""All ranks of a partitioned graph in one process: each an executor of its own, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from .executor import Executor
from .groups import Meeting
from .step import StepInput


class SimulatedRanks:
    """Runs each step on the executors of all ranks, which meet in ``meeting``; the logits are those of the first."""

    def __init__(self, executors: Sequence[Executor], meeting: Meeting) -> None:
        self._executors = list(executors)
        self._meeting = meeting
        self._threads = ThreadPoolExecutor(len(self._executors), "rank")

    def __call__(self, step: StepInput, out: Tensor | None = None) -> Tensor:
        """The logits ``[R, vocab]``; see ``Executor``.

        An exception of one rank is raised when all have stopped, with a note that names the rank.
        """
        return self.all(step, out)[0]

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
        """Write the logits of ``step.rows`` to ``logits [R, vocab]``."""
        found = self(step, logits)
        if found is not logits:
            logits.copy_(found)

    def poisoned(self) -> SimulatedRanks:
        """The same with the caches of all ranks poisoned."""
        for executor in self._executors:
            executor.poisoned()
        return self
