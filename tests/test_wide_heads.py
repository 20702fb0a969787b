"""Heads that no attention kernel takes are left to torch, with the reason; wide ones have a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep import make_deep

import fuseline

PROMPTS = [[5, 17, 3, 88, 41, 2, 9], [7, 61]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("sizes", "dtype", "why"),
    [
        ({"head_dim": 320}, None, ""),
        ({"head_dim": 640}, None, "heads of 640 numbers: a kernel has room for 512"),
        ({"head_dim": 20}, "int8", ""),
        ({"hidden_size": 42, "n_head": 6}, "int8", "heads of 7 codes: kernels read codes in pairs"),
        ({"hidden_size": 42, "n_head": 6}, None, ""),
    ],
    ids=["320", "640", "20 codes", "7 codes", "7"],
)
def test_attention_of_any_heads_is_computed(sizes: dict[str, int], dtype: str | None, why: str) -> None:
    model = make_deep("gpt2" if "n_head" in sizes else "llama", 2, **sizes)
    cache = fuseline.KVCacheConfig(dtype=dtype)
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache)
    grouping = next(item for item in compiled.report.passes if item.name == "GroupKernels")
    assert any("attention" in kernel.name for kernel in compiled.kernels) == (not why)
    assert any(why in item.why for item in grouping.refused) if why else True
    found = compiled.generate(PROMPTS, max_new_tokens=4, stop_token_ids=[])
    if dtype is None:
        assert found == [greedy(model, prompt, 4) for prompt in PROMPTS]
    else:
        whole = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache, skip=["GroupKernels"])
        assert found == whole.generate(PROMPTS, max_new_tokens=4, stop_token_ids=[])
