"""Layouts of rounded checkpoints with their configs, models written in them, and how far logits are from a model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantized_models import round_rows_of_experts, rounded_rows, wide
from rounded_checkpoints import Written, awq, gptq, in_bytes, packed, write

PROMPTS = [[5, 17, 3, 88, 41, 2, 9], [7, 7, 61]]
SMALL: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "max_step_tokens": 32}


def group_config(bits: int, group: int, sym: bool, form: str, inputs: Any = None, kind: str = "int") -> dict[str, Any]:
    """A config of compressed-tensors with one group for all linear layers."""
    strategy = "group" if group > 0 else "channel"
    weights = {"num_bits": bits, "type": kind, "symmetric": sym, "strategy": strategy}
    weights["group_size"] = group if group > 0 else None
    entry = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": entry},
        "ignore": ["lm_head"],
    }


def rows_config(kind: str = "int", **changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True, **changes}


def gptq_config(bits: int, group: int, sym: bool, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False, **changes}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[..., Written]]] = {
    "gptq": ("int4g32", gptq_config(4, 32, True), partial(gptq, bits=4, group=32, sym=True)),
    "gptq, zero points": ("uint4g32", gptq_config(4, 32, False), partial(gptq, bits=4, group=32, sym=False)),
    "gptq v2": (
        "uint4g32",
        gptq_config(4, 32, False, checkpoint_format="gptq_v2"),
        partial(gptq, bits=4, group=32, sym=False, less=0),
    ),
    "gptq, act-order": (
        "uint4g32",
        gptq_config(4, 32, False, desc_act=True),
        partial(gptq, bits=4, group=32, sym=False, mixed=True),
    ),
    "gptq, 8 bits": ("int8g32", gptq_config(8, 32, True), partial(gptq, bits=8, group=32, sym=True)),
    "gptq, 8 bits by row": ("int8", gptq_config(8, -1, True), partial(gptq, bits=8, group=-1, sym=True)),
    "gptq by row": ("int4g32", gptq_config(4, -1, True), partial(gptq, bits=4, group=-1, sym=True)),
    "awq": ("uint4g32", AWQ, partial(awq, group=32)),
    "W4A16": ("int4g32", group_config(4, 32, True, "pack-quantized"), partial(packed, bits=4, group=32, sym=True)),
    "W4A16, zero points": (
        "uint4g32",
        group_config(4, 32, False, "pack-quantized"),
        partial(packed, bits=4, group=32, sym=False),
    ),
    "W8A16": ("int8", group_config(8, -1, True, "pack-quantized"), partial(packed, bits=8, group=-1, sym=True)),
    "W8A16 in bytes": ("int8", group_config(8, -1, True, "int-quantized"), partial(in_bytes, kind=torch.int8)),
    "W8A8": (
        "int8d",
        group_config(8, -1, True, "int-quantized", rows_config()),
        partial(in_bytes, kind=torch.int8),
    ),
    "FP8": (
        "fp8",
        group_config(8, -1, True, "float-quantized", rows_config("float"), "float"),
        partial(in_bytes, kind=torch.float8_e4m3fn),
    ),
    "FP8, one factor": (
        "fp8",
        group_config(8, -1, True, "float-quantized", rows_config("float"), "float"),
        partial(in_bytes, kind=torch.float8_e4m3fn, by_row=False),
    ),
}


def written(layout: str, folder: Path, family: str = "llama") -> Any:
    """A checkpoint in a layout; returns the model that it stands for, which rounds its rows where the layout says so."""
    scheme, config, made = LAYOUTS[layout]
    return rows_rounded(write(folder, wide(family), config, made), scheme)


def rows_rounded(twin: Any, scheme: str) -> Any:
    """The model, which from now on rounds the rows of its linear layers and experts where the scheme does."""
    if scheme in ("int8d", "fp8"):
        name = "int8-dynamic" if scheme == "int8d" else "fp8"
        for where, module in list(twin.named_modules()):
            if isinstance(module, torch.nn.Linear) and module is not twin.lm_head:
                module.register_forward_pre_hook(lambda _, given: (rounded_rows(given[0], name),))
            if where.endswith(".experts"):
                round_rows_of_experts(twin, where, name)
    return twin


def distance(model: Any, compiled: Any) -> float:
    """The relative RMSE between the logits of a model and of a compiled one."""
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([prompt])).logits.double().flatten() for prompt in PROMPTS])
    found = torch.cat([compiled(torch.tensor([prompt])).logits.double().flatten() for prompt in PROMPTS])
    return float((found - wanted).norm() / wanted.norm())
