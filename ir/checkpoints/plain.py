"""Read a checkpoint whose files hold a model's parameters, whole or in pieces: each when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..dist import is_padded, spans
from ..prepare import names_of_each
from ..weights import LazyWeights
from .conversion import Conversion
from .files import Tensors, opened
from .layout import Layout


class FileWeights(LazyWeights):
    """The values of a model in safetensors files, converted to the types that the model has them in.

    ``layouts`` says for each of ``kinds`` which tensors of the files it is made of.
    """

    reads_parts = True

    def __init__(
        self, tensors: Tensors, layouts: Mapping[str, Layout], kinds: Mapping[str, Tensor], held: Mapping[str, Tensor]
    ) -> None:
        super().__init__(kinds, held)
        self._tensors, self._layouts = tensors, layouts

    def part(self, name: str, dim: int, sections: Sequence[int], ranks: int, rank: int) -> Tensor:
        if name not in self._kinds:
            return super().part(name, dim, sections, ranks, rank)
        kind, found = self._kinds[name], spans(sections, ranks, rank)
        there = kind.shape[dim]
        if there != sum(sections) and not is_padded(there, sections):
            raise ValueError(f"dim {dim} of {name} {tuple(kind.shape)} is not made of the sections {list(sections)}")
        shape = (*kind.shape[:dim], sum(size for _, size in found), *kind.shape[dim + 1 :])
        made, place = torch.empty(shape, dtype=kind.dtype), 0
        for start, size in found:
            first = min(start, there - 1)
            held = min(size, there - first)
            self._layouts[name].read(self._tensors, dim, first, made.narrow(dim, place, held))
            if held < size:
                made.narrow(dim, place + held, size - held).copy_(made.narrow(dim, place + held - 1, 1))
            place += size
        return made

    def _read(self, name: str) -> Tensor:
        kind, layout = self._kinds[name], self._layouts[name]
        if not layout.shape:
            # A tensor of a file is its pages in memory: what is kept must not change with the file.
            return self._tensors[layout.blocks[0].key].to(kind.dtype, copy=True)
        made = torch.empty(kind.shape, dtype=kind.dtype)
        layout.read(self._tensors, 0, 0, made)
        return made


def plain_weights(path: str | Path, model: PreTrainedModel, options: Mapping[str, Any]) -> FileWeights | None:
    """The values of a checkpoint, if loading does nothing but read them, stack them and put them next to each other.

    ``model`` has parameters of the shapes and types wanted, without values, and real buffers. ``options`` are those of
    ``from_pretrained``. Nothing is found where transformers does anything else with what the files hold, or would have to
    invent a value.
    """
    if type(model).from_pretrained.__func__ is not PreTrainedModel.from_pretrained.__func__:
        return None
    files = (
        None if "gguf_file" in options or getattr(model.config, "transformers_weights", None) else _files(path, model)
    )
    if files is None:
        return None
    tensors = opened(files)
    try:
        found = Conversion(model).layouts({key: Layout.of(tensors, key) for key in tensors})
    except ImportError:  # another version of transformers
        return None
    if found is None:
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    if not found.keys() <= named.keys():  # a buffer, whose type on loading is a matter of its own
        return None
    layouts = {}
    for name, names in names_of_each(model).items():
        there = [found[item] for item in names if item in found]
        if len(there) != 1:  # no value, or several that may differ
            return None
        layouts[name] = there[0]
    held = dict(model.named_buffers(remove_duplicate=False))
    fits = all(layout.shape == tuple(named[name].shape) for name, layout in layouts.items())
    return FileWeights(tensors, layouts, named, held) if fits else None


def _files(path: str | Path, model: PreTrainedModel) -> list[str] | None:
    """The safetensors files that transformers would read, one or those of an index."""
    revision = {"revision": found} if (found := getattr(model.config, "_commit_hash", None)) else {}

    def file(name: str) -> str | None:
        try:
            return cached_file(str(path), name, **revision)  # type: ignore[no-any-return]
        except OSError:
            return None

    if Path(path).is_dir() and (Path(path) / "adapter_config.json").exists():
        return None
    if whole := file(SAFE_WEIGHTS_NAME):
        return [whole]
    index = file(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return None
    try:
        return list(get_checkpoint_shard_files(str(path), index, **revision)[0])
    except (OSError, ValueError, json.JSONDecodeError):
        return None
