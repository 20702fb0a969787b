"""The logits of the model itself, with which what was compiled is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir.errors import UnsupportedModelError
from ..ir.fold import Fold
from ..ir.skeleton import Skeleton
from ..ir.weights import LazyWeights

Score = Callable[[Sequence[Sequence[int]], Fold | None], list[Tensor]]
# Bytes of weights that a rank may read for the yardstick in any case, though they be more than its part of the model:
# what a process takes for its libraries alone.
_SMALL = 1 << 30


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


def yardstick_of(
    bones: Skeleton, weights: Mapping[str, Tensor], fold: Fold | None, vocab_size: int, max_length: int, ranks: int
) -> tuple[Yardstick, str]:
    """The logits of the model itself, and what is to be said where it is not run whole.

    ``ranks`` counts those in processes of their own, each of which reads its part alone. There the few layers that the
    graph states are run if their weights take no more than a rank will hold anyway (its part of the model, not yet placed
    now) or than a small model does; a model that is not folded, if it is small.

    Raises:
        UnsupportedModelError: the model itself fails.
    """
    if bones.score is None:
        return Yardstick(), "not compared with it: weights were given by name, and there is no model to run"
    if ranks == 1 or not isinstance(weights, LazyWeights) or bones.score_few is None:
        return run_source(bones.score, fold, vocab_size, max_length), ""
    prompts = _prompts(vocab_size, max_length)
    try:
        found = bones.score_few(prompts, fold, max(_SMALL, weights.nbytes // ranks))
    except UnsupportedModelError:  # its code may count on all layers
        if fold is None:
            raise
        found = None
    if found is None:
        return Yardstick(), "not compared with it: no rank reads more than its part"
    expected = list(map(Expected, prompts, found))
    if fold is None:
        return Yardstick([], expected), ""
    said = f"compared with {fold.traced} of its {fold.layers} layers: of the others a rank reads its part alone"
    return Yardstick(expected), said


def run_source(score: Score, fold: Fold | None, vocab_size: int, max_length: int) -> Yardstick:
    """Run the model itself on random prompts: of one token, where models like to branch, and of several.

    All layers of a folded model are run once, with one prompt: that shows whether each has its own weights. That they do
    the same was compared operator by operator when the model was folded; what this is depends on the prompt at most, and
    so the few layers that the graph states, all distinct ones among them, are run with every prompt.

    Raises:
        UnsupportedModelError: the model itself fails.
    """
    prompts = _prompts(vocab_size, max_length)
    if fold is not None:
        try:
            few = list(map(Expected, prompts, score(prompts, fold)))
        except UnsupportedModelError:  # its code may count on all layers
            pass
        else:
            some = prompts[min(1, len(prompts) - 1)]
            return Yardstick(few, [Expected(some, score([some], None)[0], prompts[-1][:7])])
    return Yardstick([], list(map(Expected, prompts, score(prompts, None))))


def _prompts(vocab_size: int, max_length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = sorted({1, min(3, max_length), min(19, max_length)})
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
