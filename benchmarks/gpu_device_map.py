"""Time Hugging Face's own ``generate`` on a shape that ``device_map="auto"`` spreads over all GPUs, in bf16.

    python benchmarks/gpu_device_map.py llama-2-70b

It is what a user would do without ranks: the layers lie on one GPU after the other, and one of them works at a time. Prints a
JSON line for each batch: milliseconds of a token, from generating 33 and 1 after a prompt of 128, the median of three each.
``gpu_ranks.py steps`` times ours. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, set_module_tensor_to_device
from gpu_check import seconds
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from fuseline.runtime.bench.random_weights import RandomWeights
from fuseline.runtime.bench.shapes import shape_config

PROMPT, TOKENS = 128, 32


def spread_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, each drawn on the device that ``device_map="auto"`` gives it."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    whole = {"no_split_module_classes": list(model._no_split_modules or [])}
    places = infer_auto_device_map(model, get_balanced_memory(model, dtype=dtype, **whole), dtype=dtype, **whole)
    drawn = {place: RandomWeights(model, place) for place in set(places.values())}
    for name, _ in list(model.named_parameters()):
        owner = next(module for module in places if module in ("", name) or name.startswith(f"{module}."))
        set_module_tensor_to_device(model, name, places[owner], value=drawn[places[owner]][name])
    return dispatch_model(model, places)


def token_ms(model: PreTrainedModel, batch: int, repeats: int = 3) -> float:
    vocab = model.config.get_text_config().vocab_size
    prompts = torch.randint(0, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)

    def took(tokens: int) -> float:
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        mask = torch.ones_like(prompts)
        return seconds(lambda: model.generate(prompts, attention_mask=mask, pad_token_id=0, **exactly))[0]

    took(2)
    long, short = (statistics.median(took(tokens) for _ in range(repeats)) for tokens in (1 + TOKENS, 1))
    return 1e3 * (long - short) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    options = parser.parse_args()
    logging.set_verbosity_error()
    model = spread_model(shape_config(options.shape), torch.bfloat16)
    layers: dict[str, int] = {}
    for place in model.hf_device_map.values():
        layers[str(place)] = layers.get(str(place), 0) + 1
    for batch in (1, 8):
        found: dict[str, Any] = {"shape": options.shape, "modules_on": layers, "batch": batch}
        print(json.dumps(found | {"token_ms": round(token_ms(model, batch), 2)}), flush=True)


if __name__ == "__main__":
    main()
