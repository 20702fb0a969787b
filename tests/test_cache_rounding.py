"""KV caches in int8 and fp8: against Hugging Face's model whose keys and values are rounded by numpy alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import fuseline
from fuseline.ir.cache_rounding import head_codes, head_factors
from fuseline.runtime.options import OptionError, resolve_kv_dtype

KINDS = {"int8": "i8", "fp8": "f8e4m3"}
# The numbers of E4M3 that are not negative: three binary places, exponents from -6, below them multiples of 2^-9.
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)][:-1]
)


def nearest_code(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers rounded to codes, ties to even."""
    if kind == "int8":
        return np.clip(np.rint(x), -127, 127)
    above = np.clip(np.searchsorted(E4M3, np.abs(x)), 1, len(E4M3) - 1)
    low, high = E4M3[above - 1], E4M3[above]
    nearer = np.abs(x) - low < high - np.abs(x)
    tie = np.abs(x) - low == high - np.abs(x)
    return np.sign(x) * np.where(nearer | (tie & (above % 2 == 1)), low, high)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def rounded(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and factors of ``f32 [..., D]``, each row by itself."""
    most = np.abs(x).max(-1, keepdims=True)
    smallest = np.where(most > 0, most / np.float32(127 if kind == "int8" else 448), 1).astype(np.float32)
    tried = [to_bf16(smallest * np.float32(1 + more)) for more in ((0,) if kind == "int8" else (0, 0.25, 0.5, 0.75))]
    codes = [nearest_code((x / factors).astype(np.float32), kind) for factors in tried]
    errors = [((code * factors - x) ** 2).sum(-1, keepdims=True) for code, factors in zip(codes, tried)]
    best = np.argmin(errors, 0)
    return np.choose(best, codes), np.choose(best, tried)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_factors_are_those_of_the_definition(kind: str) -> None:
    x = torch.randn(60, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 60)[:, None, None]
    x[7, 1] = 0
    codes, factors = rounded(x.numpy(), kind)
    found = head_factors(x, KINDS[kind])
    assert np.array_equal(found.float().numpy(), factors)
    assert np.array_equal(head_codes(x, found, KINDS[kind]).float().numpy(), codes)


def with_rounded_cache(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model itself, with keys and values rounded before attention."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        def through(x: torch.Tensor) -> torch.Tensor:
            codes, factors = rounded(x.numpy(), kind)
            return torch.from_numpy((codes * factors).astype(np.float32))

        eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return eager(module, query, through(key), through(value), mask, **options)

    AttentionInterface.register(f"eager_{kind}", attend)
    AttentionMaskInterface.register(f"eager_{kind}", eager_mask)
    model.set_attn_implementation(f"eager_{kind}")
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3"])
def test_logits_are_those_of_the_model_with_rounded_keys_and_values(name: str, kind: str) -> None:
    model = make(name)
    compiled = fuseline.compile(
        model, device="cpu", max_seq_len=64, kv_cache=fuseline.KVCacheConfig(dtype=kind), verify=name == "llama"
    )
    ids = torch.randint(0, model.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, expected = model(ids).logits, with_rounded_cache(make(name), kind)(ids).logits
    errors = (compiled(ids).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    # What lies half-way between two codes may become either: the row of such a token, and those behind it, differ more.
    assert errors.median() <= 1e-4 and errors.max() <= 2e-2
    assert (plain - expected).norm() > 1e-3 * expected.norm(), "nothing was rounded"


@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_the_codes_of_earlier_steps(kind: str) -> None:
    model = make("llama")
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=fuseline.KVCacheConfig(dtype=kind))
    reference = with_rounded_cache(make("llama"), kind)
    prompts = [[3, 1, 4, 1, 5, 9], list(range(20)), [7]]
    for prompt, found in zip(prompts, compiled.generate(prompts, max_new_tokens=9, stop_token_ids=[])):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[range(len(found)), found]
        assert (logits.max(-1).values - chosen <= 1e-3 * logits.norm(dim=-1)).all()


def test_the_cache_takes_the_bytes_of_codes_and_factors() -> None:
    model, tokens = make("llama"), 1024
    sizes = {}
    for kind in (None, *KINDS):
        cache = fuseline.KVCacheConfig(max_tokens=tokens, dtype=kind)
        compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache)
        stores = compiled.engine._runner.model._caches
        sizes[kind] = compiled.report.cache_bytes
        assert sizes[kind] == sum(store.nbytes for store in stores.values())
    head_dim = model.config.head_dim
    assert sizes["int8"] == sizes["fp8"] == sizes[None] * (head_dim + 2) // (4 * head_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dump_is_enough(kind: str, tmp_path: Path) -> None:
    """The pass gives its dump again from the one before, and the last dump runs."""
    model, cache = make("llama"), fuseline.KVCacheConfig(dtype=kind)
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache, dump=tmp_path)
    before, after = (next(tmp_path.glob(f"*_{name}.txt")).read_text() for name in ("PageAttention", "QuantizeCache"))
    again = fuseline.passes.run(fuseline.ir.parse(before), ["QuantizeCache"])
    assert fuseline.ir.dump(again) == after != before
    last = fuseline.ir.parse(next(tmp_path.glob("*_GroupKernels.txt")).read_text())
    twin = fuseline.compile(last, weights=model, device="cpu", max_seq_len=64)
    ids = torch.arange(30).reshape(1, 30)
    assert torch.equal(twin(ids).logits, compiled(ids).logits)
    with pytest.raises(OptionError, match="states the type of its caches itself"):
        fuseline.compile(last, weights=model, device="cpu", kv_cache=cache)


def test_what_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_kv_dtype("float16", torch.float16, cpu) is None
    for wrong in ("int4", "float16", torch.int32):
        with pytest.raises(OptionError, match="use 'int8', 'fp8' or None"):
            resolve_kv_dtype(wrong, torch.float32, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert resolve_kv_dtype("int8", torch.bfloat16, gpu) == "i8"
    with pytest.raises(OptionError, match="the A100 has no fp8"):
        resolve_kv_dtype("fp8", torch.bfloat16, gpu)
