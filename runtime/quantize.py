"""``quantize``: a model's weights, rounded once and written as a checkpoint of compressed-tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.fx import Node
from transformers import PreTrainedModel

from ..ir.checkpoints.compressed_tensors import config_of, written
from ..ir.errors import UnsupportedModelError
from ..ir.graph import is_constant, type_of
from ..ir.loop import Loop
from ..ir.ops import op_name
from ..ir.schemes import scheme_of
from ..ir.skeleton import Skeleton, skeleton
from .calibration.activations import calibrate
from .calibration.texts import Calibration, windows_of
from .constants import fold_constants
from .lower import Wishes, lower
from .models import tokenizer_of
from .options import KVCacheConfig, OptionError, resolve, resolve_device, resolve_dtype, resolve_quantization
from .progress import Progress
from .report import Report


def quantize(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    quantization: str | Mapping[str, str | None],
    *,
    calibration: Calibration | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> str:
    """Round the weights of a model and write them to a directory, which ``compile`` and others read as they are.

    Args:
        model, device, dtype, trust_remote_code, progress: as for ``compile``. Weights that stay are written in ``dtype``.
        out: a new or empty directory; it gets weights, config and, where the model is a path, the tokenizer.
        quantization, calibration: as for ``compile``. Rows are never smoothed: the format does not know of it.

    Returns:
        What was written, in a line.

    Raises:
        UnsupportedModelError: the model cannot be compiled, or a rounded weight is no matrix of one linear layer.
        OptionError: an option makes no sense, or the directory is not empty.
    """
    wanted = resolve_quantization(quantization)
    folder = Path(out)
    if not wanted:
        raise OptionError("nothing is to be rounded: ask for a scheme")
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty; give a new directory")
    place, show = resolve_device(device), Progress(progress)
    kind = resolve_dtype(dtype, place)
    bones = skeleton(model, kind, trust_remote_code)
    if bones.schemes:
        raise OptionError("the checkpoint holds rounded weights already")
    config = bones.model.config.get_text_config()
    options = replace(resolve(config, place, kind, 1, None, None, KVCacheConfig()), quantization=wanted)
    report = Report(device=str(place), dtype=str(kind).removeprefix("torch."))
    loop = lower(bones, options, Wishes(progress=show), report).loop
    with show.line("load weights"):
        values = bones.load()
    summary, placed = "rounded to nearest", dict[str, Tensor]()
    if calibration:
        vocab = type_of(loop.graph.output_node().args[0]).shape[-1]  # type: ignore[arg-type]
        assert isinstance(vocab, int)
        windows = windows_of(calibration, model, vocab, options.max_seq_len)
        found = calibrate(loop, values, windows, 16, place, lambda items: show.bar(items, "calibrate"))
        summary, placed, values = found.summary, found.values, {**values, **found.scales}
    constants = fold_constants(loop, values, place, placed, lambda items: show.bar(items, "weights"))
    schemes, state = _state(loop, constants, bones, values)
    _write(folder, model, bones, schemes, state)
    held = sum(item.nbytes for item in state.values())
    return f"{len(schemes)} matrices, {summary}; {held / 1e6:.0f} MB in {folder}"


def _state(
    loop: Loop, constants: Mapping[Node, list[Tensor]], bones: Skeleton, values: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The schemes of rounded modules, and all tensors of the checkpoint."""
    schemes: dict[str, str] = {}
    linears = {name for name, module in bones.model.named_modules() if isinstance(module, torch.nn.Linear)}
    state = {name: values[name] for name in bones.model.state_dict()}
    if bones.model.config.get_text_config().tie_word_embeddings:
        tied = bones.model.get_output_embeddings()
        state = {
            name: item for name, item in state.items() if bones.model.get_submodule(name.rpartition(".")[0]) is not tied
        }
    for name, kind, rows in _matrices(loop, constants):
        module, scheme = name.removesuffix(".weight"), scheme_of(kind)
        assert scheme is not None
        if module not in linears:
            raise UnsupportedModelError(f"{name} is not the matrix of a linear layer, which alone the format knows")
        state.pop(name, None)
        schemes[module] = kind
        state.update(written(module, rows.cpu(), scheme, tuple(values[name].shape)))  # type: ignore[arg-type]
    return schemes, {name: item.cpu().contiguous() for name, item in state.items()}


def _matrices(loop: Loop, constants: Mapping[Node, list[Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, scheme and packed rows of each rounded matrix; those that were joined are taken apart."""
    for stage in loop.stages:
        for node in stage.nodes:
            if op_name(node.target) != "nn.quantize" or not is_constant(node):
                continue
            source = node.args[0]
            assert isinstance(source, Node)
            joined = op_name(source.target) == "aten.cat"
            parts: Any = source.args[0] if joined else [source]
            for part in parts:
                if op_name(part.target) != "weight":
                    raise UnsupportedModelError(
                        f"{part.name} is computed from a weight before it is rounded, and the format holds weights only"
                    )
            sizes = [type_of(part).concrete({})[0] for part in parts]
            for place, time in enumerate(stage.times):
                for part, rows in zip(parts, torch.split(constants[node][place], sizes)):
                    yield loop.weight(part, time), type_of(node).dtype, rows


def _write(
    folder: Path,
    model: PreTrainedModel | str | Path,
    bones: Skeleton,
    schemes: Mapping[str, str],
    state: dict[str, Tensor],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    named = {name for name, item in bones.model.named_modules() if isinstance(item, torch.nn.Linear)}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    config = copy.deepcopy(bones.model.config)
    config.quantization_config = config_of(schemes, named - set(schemes))
    if any(bones.model.get_submodule(name) is bones.model.get_output_embeddings() for name in schemes):
        # The table of embeddings stays, and what is no longer the same cannot be tied to it.
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if bones.model.generation_config is not None:
        bones.model.generation_config.save_pretrained(folder)
    if isinstance(model, PreTrainedModel):
        return
    with suppress(UnsupportedModelError):  # the model came without one
        tokenizer_of(str(model)).save_pretrained(folder)
