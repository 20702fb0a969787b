"""Time decode steps and prompts of a shape on one GPU, in bf16 and in quantisation schemes.

    python benchmarks/gpu_schemes.py llama-2-7b none int8 fp8 none/fp8

What follows a slash is the type of the KV cache. Weights are random. Prints a JSON line for each scheme: milliseconds of
``decode_step_ms`` by batch and context, and of 64 prompts of 128 tokens, the median of five runs on other tokens each.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from gpu_check import copy_bandwidth, seconds

import fuseline
from fuseline.runtime.bench.shapes import random_model, shape_config
from fuseline.runtime.options import quantization_of

STEPS = ((1, 256), (1, 500), (8, 256), (64, 256), (64, 500), (64, 1000))
PROMPTS, LENGTH = 64, 128


def prompt_ms(compiled: Any, vocab: int, runs: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)

    def once() -> float:
        prompts = torch.randint(0, vocab, (PROMPTS, LENGTH), generator=generator).tolist()
        return 1e3 * seconds(lambda: compiled.generate(prompts, max_new_tokens=1, stop_token_ids=[]))[0]

    once(), once()
    return statistics.median(once() for _ in range(runs))


def compiled_for(model: Any, scheme: str, cache: str = "", **options: Any) -> Any:
    """A model compiled for what is timed; ``scheme`` may be ``"none"``."""
    return fuseline.compile(
        model,
        device="cuda",
        dtype=torch.bfloat16,
        max_batch_size=64,
        max_seq_len=1536,
        kv_cache=fuseline.KVCacheConfig(max_tokens=64 * 1040, dtype=cache or None),
        quantization=None if scheme == "none" else quantization_of(scheme),
        **options,
    )


def times_of(compiled: Any, vocab: int) -> dict[str, float]:
    """Milliseconds of decode steps and of prompts."""
    found = {
        f"decode {batch} at {context}": round(compiled.decode_step_ms(batch, context), 3) for batch, context in STEPS
    }
    return {**found, f"prompts {PROMPTS} x {LENGTH}": round(prompt_ms(compiled, vocab), 1)}


def measure(shape: str, spec: str) -> dict[str, Any]:
    scheme, _, cache = spec.partition("/")
    config = shape_config(shape)
    model = random_model(config, "cuda", torch.bfloat16)
    begin = time.perf_counter()
    compiled = compiled_for(model, scheme, cache)
    found: dict[str, Any] = {"shape": shape, "scheme": spec, "compile_s": round(time.perf_counter() - begin, 1)}
    return found | times_of(compiled, config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("schemes", nargs="+")
    options = parser.parse_args()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_s": round(copy_bandwidth())}
    print(json.dumps(machine), flush=True)
    for spec in options.schemes:
        print(json.dumps(measure(options.shape, spec)), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
