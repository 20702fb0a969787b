"""The largest step that can come, run once while compiling: what it needs is then known to be there."""

from __future__ import annotations

import torch

from .choices import Choices
from .memory import Load
from .sequence import SamplingParams
from .step import Model, StepInput


class Meter:
    """Memory taken on a GPU since this was made, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        """The most so far."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def rehearse(model: Model, load: Load, block_size: int, scratch_block: int, choices: Choices) -> None:
    """Run the largest step, on one block that belongs to no sequence, and sample every row of it."""
    logits = model(_largest_step(load, block_size, scratch_block, choices.tokens.device))
    choices.greedy(logits)
    params = SamplingParams(temperature=1.0, top_p=0.5, seed=0)
    choices.draw(logits, [params] * len(logits), [0] * len(logits))


def _largest_step(load: Load, block_size: int, scratch_block: int, device: torch.device) -> StepInput:
    count = min(load.batch, load.tokens)
    lengths = torch.full((count,), load.tokens // count)
    lengths[: load.tokens % count] += 1
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    # Every token is written to the first slot of the block: what they read of each other does not matter.
    width = -(-int(lengths.max()) // block_size)
    return StepInput(
        tokens=torch.zeros(load.tokens, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(int(length)) for length in lengths]).to(device),
        slots=torch.full((load.tokens,), scratch_block * block_size, device=device),
        query_starts=starts.to(device, torch.int32),
        context_lens=lengths.to(device, torch.int32),
        block_tables=torch.full((count, width), scratch_block, dtype=torch.int32, device=device),
        rows=(starts[1:] - 1).to(device),
    )
