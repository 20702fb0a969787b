"""Projections on the CPU of weights held in codes: a few rows at a time become numbers, which stay in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.quantized import unpack
from ..ir.schemes import Scheme

Product = Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
"""``x [..., K]`` and a bias ``[N]`` or ``None`` give ``[..., N]`` in that type."""

# As many numbers of a weight are made at a time: 1 MB in fp32.
_AT_ONCE = 1 << 18


def rounded_product(rows: Tensor, scheme: Scheme, depth: int) -> Product:
    """The product with a weight ``[N, depth]``, of which these are the packed rows; it keeps it in as many bytes."""
    codes, factors, zeros = unpack(rows, scheme, depth)
    if scheme.group:
        numbers = _halves(codes, factors, zeros, scheme) if scheme.bits == 4 else _bytes(codes, factors)
    else:
        numbers = _whole_rows(codes)
    by_column = None if scheme.group else factors.reshape(-1)
    count, step = len(codes), max(1, _AT_ONCE // depth)

    def product(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        flat, by_row = x.reshape(-1, x.shape[-1]), None
        if scheme.dynamic:
            given, by_row, _ = unpack(flat, scheme, depth)
            flat = given.float()
        out = flat.new_empty(len(flat), count)
        for begin in range(0, count, step):
            some = slice(begin, begin + step)
            torch.mm(flat, numbers(some, flat.dtype).t(), out=out[:, some])
        if by_column is not None:
            out = out * by_column
        if by_row is not None:
            out = out * by_row
        out = out.to(dtype)
        if bias is not None:
            out = out + bias
        return out.reshape(*x.shape[:-1], count)

    return product


def _whole_rows(codes: Tensor) -> Callable[[slice, torch.dtype], Tensor]:
    """Codes as numbers; their factors are those of the sums."""
    kept = codes.contiguous()
    if kept.dtype != torch.int8:
        return lambda some, dtype: _numbers(kept[some]).to(dtype)
    return lambda some, dtype: kept[some].to(dtype)


def _numbers(codes: Tensor) -> Tensor:
    """What E4M3 codes stand for, in fp16: their bits are those of fp16 in other places, and the exponent counts from
    elsewhere. Torch has no vector instructions for it."""
    bits = codes.view(torch.int8).to(torch.int16)
    return (bits << 7).bitwise_and_(~0x4000).view(torch.float16).mul_(256)


def _bytes(codes: Tensor, factors: Tensor) -> Callable[[slice, torch.dtype], Tensor]:
    """What the codes of groups stand for, a byte each."""
    parts, sizes = codes.reshape(*factors.shape, -1), factors.unsqueeze(-1).contiguous()
    return lambda some, dtype: (parts[some] * sizes[some]).flatten(1).to(dtype)


def _halves(
    codes: Tensor, factors: Tensor, zeros: Tensor | None, scheme: Scheme
) -> Callable[[slice, torch.dtype], Tensor]:
    """What the codes of groups stand for. A byte has one code of each half of a group."""
    parts = (codes + scheme.middle).view(torch.uint8).reshape(*factors.shape, 2, scheme.group // 2)
    halves = parts[:, :, 0] | parts[:, :, 1] << 4
    sizes = factors.unsqueeze(-1).contiguous()
    points = None if zeros is None else zeros.unsqueeze(-1).contiguous()

    def numbers(some: slice, dtype: torch.dtype) -> Tensor:
        held = halves[some]
        wide = torch.empty(*held.shape[:-1], scheme.group)
        wide[..., : scheme.group // 2] = held & 15
        wide[..., scheme.group // 2 :] = held >> 4
        wide.sub_(scheme.middle if points is None else points[some]).mul_(sizes[some])
        return wide.flatten(1).to(dtype)

    return numbers
