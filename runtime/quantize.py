"""``quantize``: a model's weights, rounded once and written as a checkpoint of compressed-tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.fx import Node
from transformers import PreTrainedModel

from ..ir.checkpoints.compressed_tensors import config_of, written
from ..ir.checkpoints.conversion import in_files
from ..ir.errors import UnsupportedModelError
from ..ir.graph import is_constant, type_of
from ..ir.loop import Loop
from ..ir.ops import op_name
from ..ir.schemes import scheme_of
from ..ir.skeleton import Skeleton, skeleton
from ..passes.quantize import matrices_of
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
        UnsupportedModelError: the model cannot be compiled, or a rounded weight is no matrix of a linear layer or an
            expert.
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
    made = _written(loop, constants, bones, values)
    _write(folder, model, bones, made)
    held = sum(item.nbytes for item in made.state.values())
    return f"{len(made.schemes)} matrices, {summary}; {held / 1e6:.0f} MB in {folder}"


class _Written(NamedTuple):
    """The tensors of a checkpoint; the ``schemes`` of its rounded modules and its ``others`` that hold a matrix, by the
    names of files; and whether the output projection is rounded, and so no longer the table of embeddings."""

    state: dict[str, Tensor]
    schemes: dict[str, str]
    others: set[str]
    untied: bool


def _written(
    loop: Loop, constants: Mapping[Node, list[Tensor]], bones: Skeleton, values: Mapping[str, Tensor]
) -> _Written:
    model = bones.model
    linears = {f"{name}.weight" for name, item in model.named_modules() if isinstance(item, torch.nn.Linear)}
    head = {f"{name}.weight" for name, item in model.named_modules() if item is model.get_output_embeddings()}
    plain = {name: values[name] for name in model.state_dict()}
    if model.config.get_text_config().tie_word_embeddings:
        plain = {name: item for name, item in plain.items() if name not in head}
    schemes: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    untied = False
    for name, kind, rows in _matrices(loop, constants):
        scheme, depth = scheme_of(kind), values[name].shape[-1]
        assert scheme is not None
        plain.pop(name, None)
        untied |= name in head
        for key, part in in_files(model, {name: rows.cpu()}).items():
            module = key.removesuffix(".weight")
            if part.dim() != 2 or module == key or (rows.dim() == 2 and name not in linears):
                raise UnsupportedModelError(f"{name} is not the matrix of a linear layer, which alone the format knows")
            schemes[module] = kind
            state.update(written(module, part, scheme, (len(part), depth)))
    rest = in_files(model, plain)
    tables = {f"{name}.weight" for name, item in model.named_modules() if isinstance(item, torch.nn.Embedding)}
    matrices = {name: item for name, item in plain.items() if item.dim() == 2 and name not in tables}
    others = {key.removesuffix(".weight") for key in in_files(model, matrices)}
    return _Written({name: _alone(item) for name, item in (rest | state).items()}, schemes, others, untied)


def _alone(value: Tensor) -> Tensor:
    """A value on the CPU that shares no memory with another."""
    value = value.cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


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
                    name = min(matrices_of(part), default=part.name)
                    pattern = f"*.{name.removesuffix('.weight').rpartition('.')[2]}"
                    raise UnsupportedModelError(
                        f"{part.name} is computed from a weight before it is rounded, and the format holds weights only; "
                        f"leave {name} as it is: {{{pattern!r}: None, ...}}"
                    )
            sizes = [type_of(part).concrete({})[0] for part in parts]
            for place, time in enumerate(stage.times):
                for part, rows in zip(parts, torch.split(constants[node][place], sizes)):
                    yield loop.weight(part, time), type_of(node).dtype, rows


def _write(folder: Path, model: PreTrainedModel | str | Path, bones: Skeleton, made: _Written) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(made.state, folder, metadata={"format": "pt"})
    config = copy.deepcopy(bones.model.config)
    config.quantization_config = config_of(made.schemes, made.others)
    if made.untied:
        # The table of embeddings stays, and what is no longer the same cannot be tied to it.
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if bones.model.generation_config is not None:
        bones.model.generation_config.save_pretrained(folder)
    if isinstance(model, PreTrainedModel):
        return
    with suppress(UnsupportedModelError):  # the model came without one
        tokenizer_of(str(model)).save_pretrained(folder)
