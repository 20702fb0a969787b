"""Storage for keys and values."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..ir.loop import Loop
from ..ir.types import TensorType


def new_caches(loop: Loop, num_slots: int, device: torch.device) -> dict[str, Tensor]:
    """Storage for every ``cache(...)`` of a model, by role and layer. Caches of one type lie in one tensor."""
    caches: dict[str, Tensor] = {}
    names: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}
    for name, kind in loop.caches().items():
        names.setdefault((kind.torch_dtype, _sizes(kind)), []).append(name)
    for (dtype, sizes), found in names.items():
        caches.update(zip(found, torch.empty((len(found), num_slots, *sizes), dtype=dtype, device=device).unbind()))
    return caches


def cache_bytes_per_token(loop: Loop) -> int:
    """Bytes that one token takes in all caches together."""
    return sum(kind.torch_dtype.itemsize * prod(_sizes(kind)) for kind in loop.caches().values())


def _sizes(cache: TensorType) -> tuple[int, ...]:
    """The size of one slot of a cache."""
    return tuple(size for size in cache.shape[1:] if isinstance(size, int))
