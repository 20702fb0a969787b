"""The logits of every token of given texts, computed like prompts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from .scheduler import Chunk, Scheduler
from .sequence import Sequence


def score_all(
    prompts: SequenceOf[list[int]], scheduler: Scheduler, compute: Callable[[list[Chunk]], torch.Tensor]
) -> list[torch.Tensor]:
    """Logits [len(prompt), V] of every token of each prompt.

    ``scheduler`` has no other work, and none is left in it whatever happens. ``compute`` computes chunks and returns
    the logits of all their tokens.
    """
    for index, prompt in enumerate(prompts):
        scheduler.add(Sequence(index, list(prompt)))
    scores: dict[int, torch.Tensor] = {}
    try:
        while scheduler.has_work:
            chunks = scheduler.schedule()
            logits = compute(chunks)
            row = 0
            for chunk in chunks:
                sequence = chunk.sequence
                if sequence.id not in scores:
                    scores[sequence.id] = logits.new_empty(len(sequence.prompt), logits.shape[-1])
                # Copied: a model may hand out the same memory at every step.
                scores[sequence.id][chunk.start : chunk.stop] = logits[row : row + chunk.length]
                row += chunk.length
                if chunk.reaches_end:
                    scheduler.remove(sequence)
    finally:
        scheduler.clear()
    return [scores[index] for index in range(len(prompts))]
