"""Read a checkpoint whose matrices are rounded: a method of quantization by its name, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from . import awq, compressed_tensors, gptq
from .conversion import Conversion
from .files import tensors_of
from .held import Checkpoint, Held, unsupported
from .layout import Block, Layout

_METHODS: Mapping[str, Any] = {compressed_tensors.METHOD: compressed_tensors, "gptq": gptq, "awq": awq}


def read_checkpoint(path: str | Path, config: Mapping[str, Any], model: PreTrainedModel) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        config: its ``quantization_config``. model: the model without quantization, whose values need not be there.

    Raises:
        UnsupportedModelError: the method is not known, or a matrix is held in a way that there is no scheme for.
    """
    name = str(config.get("quant_method"))
    if name not in _METHODS:
        known = ", ".join(_METHODS)
        raise UnsupportedModelError(f"{path}: checkpoints quantized by {name} are not supported; those by {known} are")
    method, tensors = _METHODS[name], tensors_of(path)
    try:
        conversion = Conversion(model)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{path}: this version of transformers puts checkpoints together in a way that is not known: {error}"
        ) from error
    layouts = _layouts(method.outputs(tensors), conversion)
    blocks = [block for layout in layouts.values() for block in layout.blocks]
    modules = method.held(config, tensors, {block.key.removesuffix(".weight"): block.shape[-2:] for block in blocks})
    # A module holds its matrix, what belongs to the codes, and perhaps a bias.
    others = {
        name: tensors[name] for name in tensors if name.rpartition(".")[0] not in modules or name.endswith(".bias")
    }
    matrices = {f"{module}.weight": item for module, item in modules.items()}
    for value, layout in layouts.items():
        _check_alike(value, [matrices[block.key] for block in layout.blocks])
    return Checkpoint(name, matrices, layouts, others)


def _layouts(outputs: Mapping[str, int], conversion: Conversion) -> dict[str, Layout]:
    """Where matrices, given by module with their number of outputs, lie in the model's values.

    Raises:
        UnsupportedModelError: one has no place there, or a value is not filled by rows of matrices alone.
    """
    parts: dict[str, dict[str, Layout]] = {}
    for module, rows in outputs.items():
        key = f"{module}.weight"
        place = conversion.value_of(key)
        shape = conversion.values[place[0]].shape if place else ()
        if place is None or len(shape) < 2:
            raise unsupported(module, "the model has no such matrix")
        block = Block(key, (0, 0), (rows, shape[-1]))
        parts.setdefault(place[0], {})[key] = Layout(block.shape, (block,))
    found: dict[str, Layout] = {}
    for name, matrices in parts.items():
        wanted, made = tuple(conversion.values[name].shape), (conversion.layouts(matrices) or {}).get(name)
        if made is None or made.shape != wanted or any(block.shape[-1] != wanted[-1] for block in made.blocks):
            shapes = ", ".join(sorted({str(item.shape) for item in matrices.values()}))
            what = "it is" if len(matrices) == 1 else f"these {len(matrices)} matrices are"
            module = next(iter(matrices)).removesuffix(".weight")
            raise unsupported(module, f"{what} {shapes} and cannot make up the model's {name}, which is {wanted}")
        found[name] = made
    return found


def _check_alike(value: str, matrices: Sequence[Held]) -> None:
    """Raises ``UnsupportedModelError`` if the matrices of a value are not held in one way."""
    schemes = sorted({item.scheme for item in matrices})
    if len(schemes) > 1:
        raise unsupported(value, f"its {len(matrices)} matrices are held in several schemes: {', '.join(schemes)}")
    if len(matrices) > 1 and any(item.order is not None for item in matrices):
        raise unsupported(value, "its matrices have orders of inputs of their own; give a checkpoint without act-order")


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
