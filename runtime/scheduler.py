"""Decides which tokens of which sequences the next step computes, and who holds the blocks of the cache."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .pool import BlockPool, PoolError
from .sequence import Sequence


class Chunk(NamedTuple):
    """Tokens ``[start, start + length)`` of a sequence, computed in one step.

    If it ``reaches_end`` it holds the last token that the sequence has: its logits choose the next one.
    """

    sequence: Sequence
    start: int
    length: int
    reaches_end: bool

    @property
    def stop(self) -> int:
        return self.start + self.length


class Scheduler:
    """Continuous batching, first come first served, with chunked prefill and preemption by recomputation.

    Every running sequence arrived before every waiting one, and both are in order of arrival. A sequence is admitted
    only when all running ones have what they want of the step, so all but the last running one are past their
    prefill: walking them in order schedules the decodes first. When blocks run out, the last of the running gives
    its blocks up and waits again, so a sequence never loses its place to a later one, and the first always advances.

    ``max_step_tokens`` bounds the tokens of a step; if it is below the number of running sequences, the last ones
    pause. Raises PoolError from ``schedule`` if a sequence outgrows the pool alone.
    """

    def __init__(self, pool: BlockPool, max_batch_size: int, max_step_tokens: int) -> None:
        if max_batch_size < 1 or max_step_tokens < 1:
            raise ValueError(f"a step of {max_step_tokens} tokens of {max_batch_size} sequences is empty; pass >= 1")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that arrived after all others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and take its blocks back."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most one a sequence, with the blocks for them allocated.

        Empty only if there is no work. The caller adds ``length`` to ``num_computed`` once a chunk is computed.
        """
        budget = self.max_step_tokens
        block_size = self.pool.block_size
        chunks: list[Chunk] = []
        # The list shrinks from its end while it is walked: a sequence that has its chunk is never preempted.
        while len(chunks) < len(self.running) and budget:
            sequence = self.running[len(chunks)]
            start = sequence.num_computed
            length = pending = sequence.num_tokens - start
            if pending > budget:
                length = budget
            stop = start + length
            if stop > len(sequence.block_table) * block_size and not self._make_room(sequence, stop):
                break
            chunks.append(Chunk(sequence, start, length, length == pending))
            budget -= length
        # After a preemption this admits nobody: the victim is first in line, and some of its blocks are taken.
        self._admit(chunks, budget)
        if not chunks and self.has_work:
            raise PoolError(f"no sequence fits the {self.pool.num_blocks} blocks of the pool, even alone")
        return chunks

    def preempt_all(self) -> None:
        """Take the blocks of every running sequence back; all are computed again later."""
        while self.running:
            self._preempt_last()

    def clear(self) -> None:
        """Forget every sequence and take all blocks back."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            # The blocks of the whole prefill are taken at once, so a sequence cannot run dry in the middle of it.
            # One more for each running sequence spares a prefill that the next decodes would take away again.
            needed = self.pool.blocks_for(sequence.num_tokens)
            if not self.pool.can_allocate(needed + len(self.running)):
                break
            sequence.block_table.extend(self.pool.allocate(needed))
            self.running.append(self.waiting.popleft())
            length = min(sequence.num_pending, budget)
            chunks.append(Chunk(sequence, sequence.num_computed, length, length == sequence.num_pending))
            budget -= length

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence more blocks, for ``num_tokens``; False if it had to give up its own."""
        needed = self.pool.blocks_for(num_tokens) - len(sequence.block_table)
        while not self.pool.can_allocate(needed):
            if self._preempt_last() is sequence:
                return False
        sequence.block_table.extend(self.pool.allocate(needed))
        return True

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed = 0
        sequence.admissions += 1
