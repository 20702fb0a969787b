"""Hugging Face ``generate`` as it comes: eager, one static batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .peers import Peer, Setup


class Eager(Peer):
    """``model.generate`` with its default attention and cache."""

    name = "eager"
    warm_tokens = 4

    def __init__(self, setup: Setup) -> None:
        self._model: Any = setup.source.model()

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._model.device)
        # Without a mask, transformers guesses from the prompt what is padding.
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    def close(self) -> None:
        del self._model
