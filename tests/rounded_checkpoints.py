"""Checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, written with numpy from their definitions.

What is written shares nothing with the code that reads it. Codes and factors are random: they need not be good.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, np.ndarray]
"""The tensors that hold a matrix, by the end of their names, and its numbers."""


def words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes in 32-bit words along an axis; that at place ``order[i]`` has the ``i``-th bits from below."""
    places = 32 // bits
    moved = np.moveaxis(codes.astype(np.int64), axis, -1)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % places)])
    parts = moved.reshape(*moved.shape[:-1], -1, places)
    found = np.zeros(parts.shape[:-1], np.int64)
    for bit, place in enumerate(order or range(places)):
        found |= parts[..., place] << bits * bit
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found.astype(np.uint32).view(np.int32), -1, axis)))


def drawn(shape: tuple[int, int], bits: int, group: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes ``[N, K]`` from 0 on, factors (numbers of fp16) and zero points ``[N, groups]``."""
    draws = np.random.default_rng(seed)
    groups = shape[1] // group if group > 0 else 1
    codes = draws.integers(0, 1 << bits, shape)
    factors = draws.uniform(0.5, 1.5, (shape[0], groups)).astype(np.float16) / np.float16(
        (1 << bits) * shape[1] ** 0.5 / 8
    )
    return codes, factors.astype(np.float16), draws.integers(0, 16, (shape[0], groups))


def numbers(codes: np.ndarray, factors: np.ndarray, zeros: Any) -> np.ndarray:
    """What codes stand for."""
    parts = codes.reshape(*factors.shape, -1).astype(np.float32) - np.asarray(zeros, np.float32)[..., None]
    return (parts * factors[..., None].astype(np.float32)).reshape(codes.shape)


def gptq(
    shape: tuple[int, int], seed: int, bits: int, group: int, sym: bool, less: int = 1, mixed: bool = False
) -> Written:
    """GPTQ's layout; zero points are stored ``less`` one (``gptq_v2``: 0). ``mixed``: the inputs of a group lie anywhere."""
    codes, factors, zeros = drawn(shape, bits, group, seed)
    zeros = np.full_like(zeros, 1 << bits - 1) if sym else zeros
    index = np.arange(shape[1]) // (shape[1] // factors.shape[1])
    if mixed:
        np.random.default_rng(seed).shuffle(index)
    held = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words((zeros.T - less) & (1 << bits) - 1, bits, 1),
        "scales": torch.from_numpy(np.ascontiguousarray(factors.T)),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    values = (codes - zeros[:, index]).astype(np.float32) * factors[:, index].astype(np.float32)
    return held, values


def awq(shape: tuple[int, int], seed: int, group: int) -> Written:
    """AWQ's layout."""
    codes, factors, zeros = drawn(shape, 4, group, seed)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    held = {
        "qweight": words(codes.T, 4, 1, order),
        "qzeros": words(zeros.T, 4, 1, order),
        "scales": torch.from_numpy(np.ascontiguousarray(factors.T)),
    }
    return held, numbers(codes, factors, zeros)


def packed(shape: tuple[int, int], seed: int, bits: int, group: int, sym: bool) -> Written:
    """The packed layout of compressed-tensors."""
    codes, factors, zeros = drawn(shape, bits, group, seed)
    held = {
        "weight_packed": words(codes, bits, 1),
        "weight_scale": torch.from_numpy(factors).bfloat16(),
        "weight_shape": torch.tensor(shape),
    }
    if not sym:
        held["weight_zero_point"] = words(zeros, bits, 0)
    factors = held["weight_scale"].float().numpy()
    return held, numbers(codes, factors, 1 << bits - 1 if sym else zeros)


def in_bytes(shape: tuple[int, int], seed: int, kind: torch.dtype, by_row: bool = True) -> Written:
    """The layout of compressed-tensors with a code in a byte, and a factor for a row, or one for all."""
    codes, factors, _ = drawn(shape, 8, -1, seed)
    held = torch.from_numpy(codes - 128.0).clamp(-127, 127).to(kind)
    scale = torch.from_numpy(factors).float()[: None if by_row else 1]
    values = held.float().numpy() * scale.numpy()
    return {"weight": held, "weight_scale": scale if by_row else scale[0]}, values


def write(
    folder: Path,
    model: PreTrainedModel,
    config: dict[str, Any],
    made: Callable[[tuple[int, int], int], Written],
    chosen: Callable[[str], bool] = lambda name: True,
) -> PreTrainedModel:
    """Write a model with the matrices of its projections in a layout, and return it with the numbers that they hold.

    Experts have matrices of their own in files, by the names that transformers gives them there.
    """
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    numbers = dict(state)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears -= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    of_experts = {name.removesuffix(".weight") for name in state if re.search(r"\.experts\.\d+\.\w+\.weight$", name)}
    for seed, name in enumerate(sorted(linears | of_experts)):
        if not chosen(name):
            continue
        held, values = made(tuple(state[f"{name}.weight"].shape), seed)
        numbers[f"{name}.weight"] = torch.from_numpy(values)
        del state[f"{name}.weight"]
        state.update({f"{name}.{end}": item.contiguous() for end, item in held.items()})
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "quantization_config": config}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    twin = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=numbers, attn_implementation="eager"
    )
    return twin.eval()
