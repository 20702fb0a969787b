"""The logits of a model itself: of all of it, or of those of its layers that are traced."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .fold import Fold, shortened
from .weights import LazyWeights


def score_model(model: PreTrainedModel, prompts: Sequence[Sequence[int]], fold: Fold | None) -> list[Tensor]:
    """The logits ``[len(prompt), vocab]`` of each prompt, with the layers alone that ``fold`` traces.

    Raises:
        UnsupportedModelError: the model fails.
    """
    found = []
    with torch.inference_mode(), shortened(model, fold) if fold else nullcontext():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=model.device)
            try:
                found.append(model(input_ids=tokens).logits[0].float().cpu())
            except Exception as error:  # the model's own code
                raise UnsupportedModelError(
                    f"{type(model).__name__} itself fails on a prompt of {len(prompt)} tokens: {error}"
                ) from error
    return found


def score_few(
    model: PreTrainedModel, weights: LazyWeights, prompts: Sequence[Sequence[int]], fold: Fold | None, most: int
) -> list[Tensor] | None:
    """``score_model`` of a model without values, which is given those of the layers that are run; nothing if they take
    more than ``most`` bytes.

    Raises:
        UnsupportedModelError: the model fails.
    """
    with shortened(model, fold) if fold else nullcontext():
        names = {id(item): name for name, item in model.named_parameters()}
        if sum(_bytes(weights, name) for name in names.values()) > most:
            return None
        values = {place: torch.nn.Parameter(weights[name], requires_grad=False) for place, name in names.items()}
        for module in model.modules():
            for name, item in module._parameters.items():
                module._parameters[name] = None if item is None else values[id(item)]
        return score_model(model, prompts, None)


def _bytes(weights: LazyWeights, name: str) -> int:
    known = weights.like(name)
    return 0 if known is None else known.nbytes
