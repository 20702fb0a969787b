"""Arrays that lie side by side in one buffer, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes that each array's address is a multiple of: kernels load 16 at a time."""


class Layout:
    """Where each of ``fields``, ``(name, dtype, shape)``, lies in a buffer of ``size`` bytes."""

    def __init__(self, fields: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self._fields = tuple(fields)
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, dtype, shape in self._fields:
            self.offsets[name] = self.size
            self.size += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, store: Tensor) -> dict[str, Tensor]:
        """The arrays in ``store u8[size]``, by name; they share its memory."""
        found = {}
        for name, dtype, shape in self._fields:
            begin = self.offsets[name]
            found[name] = store[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return found
