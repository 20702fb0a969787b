"""Read a checkpoint whose matrices are rounded: a method of quantization by its name, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from . import awq, compressed_tensors, gptq
from .files import tensors_of
from .held import Checkpoint

_METHODS = {compressed_tensors.METHOD: compressed_tensors.held, "gptq": gptq.held, "awq": awq.held}


def read_checkpoint(path: str | Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        config: its ``quantization_config``. shapes: of the parameters of the model without quantization, by name.

    Raises:
        UnsupportedModelError: the method is not known, or a matrix is held in a way that there is no scheme for.
    """
    method = str(config.get("quant_method"))
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise UnsupportedModelError(
            f"{path}: checkpoints quantized by {method} are not supported; those by {known} are"
        )
    tensors = tensors_of(path)
    matrices = _METHODS[method](config, tensors, shapes)
    # A module holds its matrix, what belongs to the codes, and perhaps a bias.
    others = {
        name: tensors[name] for name in tensors if name.rpartition(".")[0] not in matrices or name.endswith(".bias")
    }
    return Checkpoint(method, {f"{module}.weight": item for module, item in matrices.items()}, others)


def plain_model(
    checkpoint: Checkpoint, kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of that class with the numbers that a checkpoint's codes stand for.

    Raises:
        UnsupportedModelError: the model has other parameters than the checkpoint.
    """
    state = dict(checkpoint.others)
    for name, item in checkpoint.matrices.items():
        state[name] = item.numbers(dtype)
    model, found = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    odd = sorted({*found["missing_keys"], *(name for name in found["unexpected_keys"] if state[name].any())})
    if odd:
        raise UnsupportedModelError(f"{kind.__name__} and the checkpoint do not fit: {odd[0]} is in one of them only")
    return model


def summary(checkpoint: Checkpoint) -> str:
    """What a checkpoint holds, for a report."""
    counts = Counter(item.scheme for item in checkpoint.matrices.values())
    return f"{checkpoint.method}: " + ", ".join(f"{count} matrices {scheme}" for scheme, count in counts.items())
