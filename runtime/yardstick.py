"""The logits of the model itself, with which what was compiled is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir.errors import UnsupportedModelError
from ..ir.fold import Fold

Score = Callable[[Sequence[Sequence[int]], Fold | None], list[Tensor]]


@dataclass(frozen=True)
class Expected:
    """``logits [len(prompt), vocab]`` of the model itself; ``neighbour`` is another prompt of the same step, if any."""

    prompt: list[int]
    logits: Tensor
    neighbour: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Yardstick:
    """What the model itself gives: ``few`` with the layers alone that its folded graph states, ``whole`` with all."""

    few: list[Expected] = field(default_factory=list)
    whole: list[Expected] = field(default_factory=list)


def run_source(score: Score, fold: Fold | None, vocab_size: int, max_length: int) -> Yardstick:
    """Run the model itself on random prompts: of one token, where models like to branch, and of several.

    All layers of a folded model are run once, with one prompt: that shows whether each has its own weights. That they do
    the same was compared operator by operator when the model was folded; what this is depends on the prompt at most, and
    so the few layers that the graph states, all distinct ones among them, are run with every prompt.

    Raises:
        UnsupportedModelError: the model itself fails.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = sorted({1, min(3, max_length), min(19, max_length)})
    prompts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    if fold is not None:
        try:
            few = list(map(Expected, prompts, score(prompts, fold)))
        except UnsupportedModelError:  # its code may count on all layers
            pass
        else:
            some = prompts[min(1, len(prompts) - 1)]
            return Yardstick(few, [Expected(some, score([some], None)[0], prompts[-1][:7])])
    return Yardstick([], list(map(Expected, prompts, score(prompts, None))))
