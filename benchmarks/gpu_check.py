"""Check and time real shapes on one GPU: tokens against Hugging Face in fp32, rounding in bf16 and fp16, speed.

    python benchmarks/gpu_check.py smollm2=path/to/model llama-3.2-1b

A model is NAME=PATH, or the name of a shape of ``fuseline bench``, which gets random weights.
Prints one JSON line for each model and type.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import fuseline
from fuseline.runtime.bench.shapes import random_model, shape_config
from fuseline.runtime.models import resolve

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_of(source: str) -> PreTrainedModel:
    """The model on the GPU in fp32."""
    path = source.partition("=")[2]
    if path:
        made = AutoModelForCausalLM.from_pretrained(resolve(path), dtype=torch.float32)
    else:
        made = random_model(shape_config(source), "cuda", torch.float32)
    made.set_attn_implementation("eager")
    made.generation_config.eos_token_id = None
    return made.cuda().eval()


def prompts(vocab: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def seconds(run: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def copy_bandwidth() -> float:
    """GB/s of a large device copy, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    elapsed, _ = seconds(lambda: [target.copy_(source) for _ in range(20)])
    return 20 * 2 * source.numel() / elapsed / 1e9


def hf_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    # No end token on either side (`min_new_tokens` would forbid it, which is something else), and no guess from the
    # prompt what is padding.
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def check(name: str, wide: PreTrainedModel, kind: str, count: int, new: int) -> dict[str, Any]:
    """One model in one type."""
    dtype = DTYPES[kind]
    model = wide if kind == "fp32" else AutoModelForCausalLM.from_config(wide.config, dtype=dtype).cuda().eval()
    if model is not wide:
        model.load_state_dict(wide.state_dict())
        model.set_attn_implementation("eager")
    elapsed, compiled = seconds(
        lambda: fuseline.compile(
            model, device="cuda", dtype=dtype, max_seq_len=1024, kv_cache=fuseline.KVCacheConfig(max_tokens=32768)
        )
    )
    given = prompts(wide.config.vocab_size, count)
    out: dict[str, Any] = {"model": name, "dtype": kind, "compile_s": round(elapsed, 1)}
    out["kernels"] = compiled.report.distinct_kernels
    out["other_operators"] = compiled.report.other_operators
    if kind == "fp32":
        ours = compiled.generate(given, max_new_tokens=new, stop_token_ids=[])
        theirs = [hf_greedy(model, prompt, new) for prompt in given]
        out["identical"] = sum(left == right for left, right in zip(ours, theirs))
        out["prompts"] = count
    ids = torch.tensor([given[0][:256]], device="cuda")
    with torch.no_grad():
        if kind == "fp32":
            out["error"] = relative(compiled(ids).logits, wide(ids).logits)
        else:
            rounded = AutoModelForCausalLM.from_config(wide.config, dtype=torch.float32).cuda().eval()
            rounded.load_state_dict(model.state_dict())
            rounded.set_attn_implementation("eager")
            exact = rounded(ids).logits
            out["error"], out["eager_error"] = relative(compiled(ids).logits, exact), relative(model(ids).logits, exact)
    for batch in (1, 8):
        row = [prompt[:128] for prompt in prompts(wide.config.vocab_size, batch)]
        compiled.generate(row, max_new_tokens=8, stop_token_ids=[])
        elapsed, _ = seconds(lambda row=row: compiled.generate(row, max_new_tokens=64, stop_token_ids=[]))
        out[f"tokens_per_s_batch_{batch}"] = round(64 * batch / elapsed, 1)
    hf_greedy(model, given[0][:64], 8)
    elapsed, _ = seconds(lambda: hf_greedy(model, given[0][:64], 64))
    out["hf_eager_tokens_per_s_batch_1"] = round(64 / elapsed, 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtypes", default="fp32,bf16,fp16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    logging.set_verbosity_error()
    print(
        json.dumps(
            {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_s": round(copy_bandwidth())}
        )
    )
    for source in options.models:
        wide = model_of(source)
        for kind in options.dtypes.split(","):
            print(json.dumps(check(source.partition("=")[0], wide, kind, options.prompts, options.new)), flush=True)


if __name__ == "__main__":
    main()
