"""Perplexity of a model on token windows, and how its predictions differ from those of a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import OptionError

Score = Callable[[Sequence[int]], Tensor]
"""The logits ``[len(window), V]`` of every token of a window."""


@dataclass(frozen=True)
class Quality:
    """How well a model predicts the tokens of a text, each from those before it in its window.

    perplexity     exp of the mean negative log-likelihood
    divergence     mean over predictions of KL(reference || model), in nats
    agreement      share of predictions whose likeliest token is the reference's
    """

    perplexity: float
    divergence: float
    agreement: float


def windows(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """The first ``count`` runs of ``length`` tokens.

    Raises:
        OptionError: the text is shorter.
    """
    if len(tokens) < count * length:
        raise OptionError(
            f"the text has {len(tokens)} tokens, {count} windows of {length} need {count * length}: give a longer text, or "
            "fewer or shorter windows"
        )
    return [list(tokens[begin : begin + length]) for begin in range(0, count * length, length)]


def predictions(score: Score, texts: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Log-probabilities ``f32 [len(window) - 1, V]``, on the CPU, of what follows each token, for each window."""
    for window in texts:
        yield torch.log_softmax(score(window)[:-1].float(), -1).cpu()


def compare(found: Iterable[Tensor], reference: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> Quality:
    """Compare a model's ``predictions`` on some windows with those of a reference."""
    loss = divergence = 0.0
    same = total = 0
    for ours, theirs, window in zip(found, reference, texts, strict=True):
        wanted = torch.tensor(window[1:])
        loss -= float(ours.gather(1, wanted[:, None]).double().sum())
        divergence += float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        total += len(wanted)
    return Quality(math.exp(loss / total), divergence / total, same / total)
