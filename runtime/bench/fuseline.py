"""Fuseline as a participant."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from ..compile import compile
from ..events import TokenEvent
from ..options import KVCacheConfig, quantization_of
from ..sequence import SamplingParams
from .peers import OURS, Peer, Served, Setup
from .workloads import Request

_WORKSPACE = 2 << 30
"""Bytes of the device's memory that are left to values within a step."""


class Fuseline(Peer):
    """The compiled model and its engine; ``compiled`` is the ``CompiledModel``."""

    name = OURS
    divides = True

    def __init__(self, setup: Setup) -> None:
        # Rounded, it gives other tokens than the model.
        self.same_weights = not setup.rounding
        source = setup.source
        model: Any = source.model()
        weights = sum(item.numel() * item.element_size() for item in model.parameters())
        if source.path is not None:
            # Read from the disk, the weights are not on the device twice.
            model = source.path
            source.release()
        # A rank has its part of weights and heads: how many tokens fit is left to compile.
        tokens = cache_tokens(setup, weights) if setup.tensor_parallel == 1 else None
        self.compiled = compile(
            model,
            device=source.device,
            dtype=source.dtype,
            max_batch_size=setup.max_batch_size,
            max_seq_len=setup.max_seq_len,
            max_step_tokens=setup.max_step_tokens,
            kv_cache=KVCacheConfig(max_tokens=tokens, dtype=setup.kv_cache, memory_share=setup.memory),
            tensor_parallel=setup.tensor_parallel,
            expert_parallel=setup.expert_parallel,
            quantization=quantization_of(setup.quantization) if setup.quantization else None,
        )
        source.release()

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = self.compiled.generate(prompts, max_new_tokens=new_tokens, stop_token_ids=[])
        return answers

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        engine, coming = self.compiled.engine, deque(requests)
        served: dict[int, Served] = {}
        begin = time.perf_counter()

        def admit() -> None:
            now = time.perf_counter() - begin
            while coming and coming[0].arrival <= now:
                request = coming.popleft()
                served[engine.add(request.prompt, SamplingParams(request.new_tokens))] = Served([], [])

        def note(event: TokenEvent) -> None:
            one = served[event.sequence_id]
            one.tokens.append(event.token)
            one.times.append(time.perf_counter() - begin)
            admit()

        while coming:
            time.sleep(max(0.0, coming[0].arrival - (time.perf_counter() - begin)))
            admit()
            engine.run(note)
        return [served[identity] for identity in sorted(served)]

    def step_ms(self, batch: int, context: int) -> float | None:
        measure = getattr(self.compiled, "decode_step_ms", None)
        return None if measure is None else float(measure(batch, context))

    def steps(self) -> int | None:
        return self.compiled.stats.steps

    def close(self) -> None:
        self.compiled.close()
        del self.compiled


def cache_tokens(setup: Setup, weights: int) -> int | None:
    """Tokens of the KV cache that the share of the memory leaves room for, and that can be of use.

    ``weights`` are the bytes of the model's weights. ``None``, the choice of ``compile``, on the CPU and where the
    config does not say how large a token's keys and values are.
    """
    source, text = setup.source, setup.source.text
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None)
    if width is None and getattr(text, "hidden_size", None) and getattr(text, "num_attention_heads", None):
        width = text.hidden_size // text.num_attention_heads
    layers = getattr(text, "num_hidden_layers", None)
    if source.device.type != "cuda" or not (heads and width and layers):
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(source.device)
    # While a live model is compiled, its weights and the merged copies of them are there at once.
    room = min(int(total * setup.memory), free) - weights - _WORKSPACE
    row = int(width) + 2 if setup.kv_cache else int(width) * source.dtype.itemsize  # codes and their factor, or numbers
    per_token = 2 * int(layers) * int(heads) * row
    return max(setup.max_seq_len, min(setup.max_batch_size * setup.max_seq_len, room // per_token))
