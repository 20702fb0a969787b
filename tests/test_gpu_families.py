"""Every family of the tests on a GPU: the tokens of transformers in fp32, and kernels that agree with their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep import make_deep
from families import FAMILIES, REQUIRED, make
from test_gpu import greedy, prompts, relative

import fuseline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (1, 5, 33)


def check(model: Any, **options: Any) -> None:
    vocab = model.config.get_text_config().vocab_size
    given = [prompt[:length] for prompt, length in zip(prompts(vocab)[::-1], LENGTHS, strict=False)]
    compiled = fuseline.compile(
        model, device="cuda", dtype=torch.float32, max_seq_len=64, tuning=False, verify=True, **options
    )
    assert f"{len(compiled.kernels)} kernels agree with their references" in compiled.report.verification
    answers = compiled.generate(given, max_new_tokens=6, stop_token_ids=[])
    assert answers == [greedy(model, prompt, 6) for prompt in given]
    ids = torch.tensor([given[-1]], device="cuda")
    with torch.no_grad():
        assert relative(compiled(ids).logits, model(ids).logits) <= 1e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REQUIRED])
def test_families(name: str) -> None:
    """Refused is only what is refused on a CPU, too."""
    try:
        check(make(name).cuda())
    except fuseline.UnsupportedModelError:
        with pytest.raises(fuseline.UnsupportedModelError):
            fuseline.compile(make(name), device="cpu", max_seq_len=64)


@pytest.mark.parametrize("head_dim", [320, 512, 640])
def test_wide_heads(head_dim: int) -> None:
    check(make_deep("llama", 2, head_dim=head_dim).cuda())


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_wide_heads_in_codes(dtype: str) -> None:
    """Beside the same codes read by torch: a code on the border of two may become the other one."""
    model = make_deep("llama", 2, head_dim=512).cuda()
    given = {
        "device": "cuda",
        "dtype": torch.float32,
        "max_seq_len": 64,
        "tuning": False,
        "kv_cache": fuseline.KVCacheConfig(dtype=dtype),
    }
    compiled = fuseline.compile(model, verify=True, **given)
    assert f"{len(compiled.kernels)} kernels agree with their references" in compiled.report.verification
    whole = fuseline.compile(model, skip=["GroupKernels"], **given)
    ids = torch.tensor([prompts(model.config.vocab_size)[-1]], device="cuda")
    assert relative(compiled(ids).logits, whole(ids).logits) <= 1e-2
