"""The Hugging Face forward under ``torch.compile`` with CUDA graphs and a static cache, without ``generate`` around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from .peers import Peer, Setup

Step = Callable[[Tensor, Tensor], Tensor]


class TorchCompile(Peer):
    """Decodes with a compiled step that holds the forward and the choice of the token; the prefill is eager.

    Each batch and length is compiled for itself, with fixed shapes, which is what is fastest.
    """

    name = "torch-compile"
    prefills = False

    def __init__(self, setup: Setup) -> None:
        self._model: Any = setup.source.model()
        self._made: dict[tuple[int, int], tuple[StaticCache, Step]] = {}

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._model.device)
        batch, length = ids.shape
        # A first token alone needs no room for more: it is computed in the cache of the longer run there was before.
        known = [size for size in self._made if size[0] == batch and size[1] >= length + new_tokens]
        cache, step = self._made[known[0]] if known else self._make(batch, length + new_tokens)
        cache.reset()
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        place = torch.full((batch, 1), length, device=ids.device)
        found = [token]
        begin_step: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
        for _ in range(new_tokens - 1):
            begin_step()
            # The graph writes each step's token to the same memory.
            token = step(token, place).clone()
            place += 1
            found.append(token)
        return [row.tolist() for row in torch.cat(found, 1)]

    def _make(self, batch: int, length: int) -> tuple[StaticCache, Step]:
        self._forget()
        cache, model = StaticCache(config=self._model.config, max_cache_len=length), self._model

        def step(token: Tensor, place: Tensor) -> Tensor:
            logits = model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True).logits
            chosen: Tensor = logits[:, -1].argmax(-1, keepdim=True)
            return chosen

        made = cache, torch.compile(step, mode="reduce-overhead", dynamic=False)
        self._made[batch, length] = made
        return made

    def _forget(self) -> None:
        self._made.clear()
        torch.compiler.reset()

    def close(self) -> None:
        self._forget()
        del self._model
