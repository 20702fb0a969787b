"""The tensors of a checkpoint's safetensors files, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ..errors import UnsupportedModelError


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name, and what is known of them without reading: ``shape`` and ``dtype``."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def piece(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """``size`` from ``start`` on along one dim of a tensor; nothing else of it is read. Raises ``KeyError``."""
        part: torch.Tensor = self._files[name].get_slice(name)[(*[slice(None)] * dim, slice(start, start + size))]
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ``KeyError`` if there is none of that name."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The element type as the files name it: ``I32``, ``F8_E4M3``. Raises ``KeyError``."""
        return str(self._files[name].get_slice(name).get_dtype())


def tensors_of(path: str | Path) -> Tensors:
    """The tensors of a directory, or of a hub id.

    Raises:
        UnsupportedModelError: there are no safetensors files.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModelError(f"{path}: a quantized checkpoint must lie in .safetensors files; there are none")
    return opened(files)


def opened(files: Iterable[str | Path]) -> Tensors:
    """The tensors of safetensors files."""
    handles = [safe_open(file, "pt") for file in files]
    return Tensors({name: file for file in handles for name in file.keys()})  # type: ignore[no-untyped-call] # noqa: SIM118
