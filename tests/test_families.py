"""Every family that compiles computes what transformers computes: the same logits, the same greedy tokens.

If this fails, a family is silently wrong. Prompts are longer than the windows of the tiny configs, and of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES, REQUIRED, make
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from triton_interpreter import interpreted_by

import fuseline
from fuseline import ir

TOLERANCE = 1e-5  # relative RMSE in fp32

# Each for something of its own: latent attention, shared layers, other norms, routers, rotary variants, multipliers.
OTHERS = (
    "apertus cohere2 cohere_compass_text deepseek_v2-groups deepseek_v3-yarn diffllama exaone4-window gemma4_text glm4 "
    "granite-multipliers llama4_text-chunked minimax-full nemotron olmo-clip olmo2 phi-qk-layernorm stablelm-parallel "
    "starcoder2-window gpt_bigcode gpt_neox-sequential mimo_v2_flash opt-post-norm opt-plain-norms gpt2-inverse-upcast "
    "gpt2-no-scale qwen2_moe qwen2-window mixtral-jitter phi3-partial phimoe gemma2-small-softcap llama-yarn llama-llama3 "
    "llama-dynamic llama-relu2 llama-one-kv-head llama-tied llama-vocab-257 gpt_oss-yarn bert-decoder bart-decoder "
    "roc_bert-decoder"
).split()


@pytest.fixture(scope="module", autouse=True)
def interpreted_once(pool: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with interpreted_by(pool, tmp_path_factory.mktemp("kernels")):
        yield


def compile(model: PreTrainedModel, **options: Any) -> fuseline.CompiledModel:
    cache = fuseline.KVCacheConfig(max_tokens=256)
    return fuseline.compile(model, device="cpu", **{"max_seq_len": 64, "kv_cache": cache, **options})


def prompts_for(model: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in (1, 7, 17, 40)]


def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits


def check_equal(model: PreTrainedModel, compiled: fuseline.CompiledModel) -> None:
    """Logits of each prompt alone; greedy tokens of all prompts in one batch against one forward for each token."""
    prompts = prompts_for(model)
    for prompt in prompts:
        expected = logits_of(model, prompt)
        error = (compiled(torch.tensor([prompt])).logits - expected).norm() / expected.norm()
        assert float(error) < TOLERANCE, f"{len(prompt)} tokens"
    answers = compiled.generate(prompts, max_new_tokens=6, stop_token_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(logits_of(model, tokens)[0, -1].argmax()))
        assert answer == tokens[len(prompt) :], f"{len(prompt)} tokens"


@pytest.mark.parametrize("name", REQUIRED)
def test_required_family(name: str) -> None:
    model = make(name)
    # A prompt whose logits are alike everywhere, or saturated, would hide a wrong mask.
    spread = logits_of(model, prompts_for(model)[-1])[0]
    assert float((spread - spread.mean(0)).std()) > 0.3 * float(spread.std()) > 0.1
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    config, attention = model.config.to_dict(), model.config._attn_implementation
    before = model.generate(torch.tensor([prompts_for(model)[1]]), max_new_tokens=4, do_sample=False)
    model.train()

    compiled = compile(model, verify=True)

    assert model.training and model.config._attn_implementation == attention and model.config.to_dict() == config
    model.eval()
    after = model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[key], after[key]) for key in weights)
    assert torch.equal(model.generate(torch.tensor([prompts_for(model)[1]]), max_new_tokens=4, do_sample=False), before)
    assert all(item.requires_grad for item in model.parameters())

    text = str(compiled.graph)
    assert str(ir.parse(text)) == text
    check_equal(model, compiled)


@pytest.mark.parametrize("name", [name for name in OTHERS if FAMILIES[name].kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_other_family(name: str) -> None:
    model = make(name)
    compiled = compile(model, verify=True)
    text = str(compiled.graph)
    assert str(ir.parse(text)) == text
    check_equal(model, compiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_a_narrow_model_compiles_in_its_own_type_and_in_fp32(name: str, dtype: torch.dtype) -> None:
    """In fp32 the numbers are those of the same weights widened; in its own type they are as near as rounding allows."""
    model = make(name, dtype)
    wide = compile(model, dtype=torch.float32)
    model_in_fp32 = make(name, dtype).float()
    for prompt in prompts_for(model):
        expected = logits_of(model_in_fp32, prompt)
        error = (wide(torch.tensor([prompt])).logits - expected).norm() / expected.norm()
        assert float(error) < TOLERANCE
    narrow = compile(model, dtype=dtype)
    prompt = prompts_for(model)[2]
    exact = logits_of(model_in_fp32, prompt)[0]
    theirs, ours = logits_of(model, prompt)[0].float(), narrow(torch.tensor([prompt])).logits[0].float()
    assert float((ours - exact).norm(dim=-1).median()) < 2 * float((theirs - exact).norm(dim=-1).median())


def test_a_model_that_saw_a_long_sequence_compiles_with_the_frequencies_of_short_ones() -> None:
    model = make("phi3-longrope")
    logits_of(model, list(range(3, 63)))
    compiled = compile(model, max_seq_len=32)
    prompt = prompts_for(model)[2]
    expected = logits_of(model, prompt)
    assert float((compiled(torch.tensor([prompt])).logits - expected).norm() / expected.norm()) < TOLERANCE
