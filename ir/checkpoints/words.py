"""Codes of a few bits in 32-bit words, as checkpoints hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """The codes ``u8`` in words ``i32``, ``32 / bits`` along ``dim`` in the place of each.

    The code at place ``order[i]`` has the bits from ``bits * i`` on; by default ``order`` is 0, 1, 2, ...
    """
    places = range(32 // bits)
    mask = (1 << bits) - 1
    parts = [words >> bits * place & mask for place in places]
    if order is not None:
        parts = [parts[order.index(place)] for place in places]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1).to(torch.uint8)


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Words ``i32`` of codes from 0 to ``2**bits - 1``, the first in the lowest bits; zeros fill up the last word."""
    moved = codes.movedim(dim, -1).to(torch.int64)
    places = 32 // bits
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % places))
    shifts = bits * torch.arange(places, device=codes.device)
    words = (moved.reshape(*moved.shape[:-1], -1, places) << shifts).sum(-1)
    # The highest bit of a word is its sign.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim).contiguous()
