"""Read a checkpoint whose files hold a model's parameters under their own names: each when it is asked for."""

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

from ..dist import spans
from ..prepare import names_of_each
from ..weights import LazyWeights
from .files import Tensors, opened


class FileWeights(LazyWeights):
    """The values of a model in safetensors files, converted to the types that the model has them in."""

    reads_parts = True

    def __init__(
        self, tensors: Tensors, keys: Mapping[str, str], kinds: Mapping[str, Tensor], held: Mapping[str, Tensor]
    ) -> None:
        super().__init__(kinds, held)
        self._tensors, self._keys = tensors, keys

    def part(self, name: str, dim: int, sections: Sequence[int], ranks: int, rank: int) -> Tensor:
        if name not in self._kinds:
            return super().part(name, dim, sections, ranks, rank)
        kind, found = self._kinds[name], spans(sections, ranks, rank)
        if kind.shape[dim] != sum(sections):
            raise ValueError(f"dim {dim} of {name} {tuple(kind.shape)} is not made of the sections {list(sections)}")
        shape = (*kind.shape[:dim], sum(size for _, size in found), *kind.shape[dim + 1 :])
        made, place = torch.empty(shape, dtype=kind.dtype), 0
        for start, size in found:
            made.narrow(dim, place, size).copy_(self._tensors.piece(self._keys[name], dim, start, size))
            place += size
        return made

    def _read(self, name: str) -> Tensor:
        # A tensor of a file is its pages in memory: what is kept must not change with the file.
        return self._tensors[self._keys[name]].to(self._kinds[name].dtype, copy=True)


def plain_weights(path: str | Path, model: PreTrainedModel, options: Mapping[str, Any]) -> FileWeights | None:
    """The values of a checkpoint, if loading does nothing but read them; else nothing.

    ``model`` has parameters of the shapes and types wanted, without values, and real buffers. ``options`` are those of
    ``from_pretrained``. Nothing is found where transformers renames, stacks or splits what the files hold, or would have
    to invent a value.
    """
    if type(model).from_pretrained.__func__ is not PreTrainedModel.from_pretrained.__func__:
        return None
    files = (
        None if "gguf_file" in options or getattr(model.config, "transformers_weights", None) else _files(path, model)
    )
    if files is None:
        return None
    tensors = opened(files)
    state = {name: item for name, item in model.state_dict().items() if isinstance(item, Tensor)}
    found = _keys(tensors, model, state)
    if found is None:
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    if not found.keys() <= named.keys():  # a buffer, whose type on loading is a matter of its own
        return None
    keys = {}
    for name, names in names_of_each(model).items():
        there = [found[item] for item in names if item in found]
        if len(there) != 1:  # no value, or several that may differ
            return None
        keys[name] = there[0]
    held = dict(model.named_buffers(remove_duplicate=False))
    fits = all(tensors.shape(key) == tuple(named[name].shape) for name, key in keys.items())
    return FileWeights(tensors, keys, named, held) if fits else None


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


def _keys(tensors: Tensors, model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """The files' name of each value that they hold, by the model's name; nothing if one is not held as it is.

    The names are matched by what transformers itself does on loading.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # another version of transformers
        return None
    changes = get_model_conversion_mapping(model)
    renamings = [item for item in changes if isinstance(item, WeightRenaming)]
    converters = [item for item in changes if isinstance(item, WeightConverter)]
    found: dict[str, str] = {}
    for key in tensors:
        plain, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if (name != plain or converter is not None) and (name in state or key not in state):
            return None
        if plain in state:
            if plain in found:
                return None
            found[plain] = key
    return found
