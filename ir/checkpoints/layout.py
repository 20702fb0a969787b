"""Where a checkpoint's tensors lie in a value of a model that is made of several, such as a matrix for each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .files import Tensors


@dataclass(frozen=True)
class Block:
    """A tensor of the files in a value: where it begins, and its shape there, with a dim that it is ``stacked`` along."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: int | None = None

    def piece(self, tensors: Tensors, dim: int, start: int, size: int) -> Tensor:
        """``size`` from ``start`` on along a dim of the value; nothing else of the tensor is read."""
        if self.stacked is None:
            return tensors.piece(self.key, dim, start, size)
        if dim == self.stacked:
            return tensors[self.key].unsqueeze(dim)
        return tensors.piece(self.key, dim - (dim > self.stacked), start, size).unsqueeze(self.stacked)


@dataclass(frozen=True)
class Layout:
    """A value of a ``shape`` and the ``blocks`` that fill it. Stands for a tensor where tensors are stacked and put next to
    each other; what else is done with it raises a ``TypeError``."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, tensors: Tensors, key: str) -> Layout:
        """A tensor of the files as it is. Raises ``KeyError`` if there is none of that name."""
        shape = tensors.shape(key)
        return cls(shape, (Block(key, (0,) * len(shape), shape),))

    def read(self, tensors: Tensors, dim: int, start: int, into: Tensor) -> None:
        """Fill ``into`` with what a dim has from ``start`` on; nothing else is read."""
        for block in self.blocks:
            first = max(start, block.start[dim])
            size = min(start + into.shape[dim], block.start[dim] + block.shape[dim]) - first
            if size <= 0:
                continue
            place = into.narrow(dim, first - start, size)
            for other in set(range(len(self.shape))) - {dim}:
                place = place.narrow(other, block.start[other], block.shape[other])
            place.copy_(block.piece(tensors, dim, first - block.start[dim], size))

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Layout:
        known: dict[Any, Callable[..., Layout]] = {torch.stack: _stacked, torch.cat: _side_by_side}
        return known[function](*args, **(kwargs or {})) if function in known else NotImplemented


def _side_by_side(items: Sequence[Layout], dim: int = 0) -> Layout:
    first = items[0].shape
    if any(_without(item.shape, dim) != _without(first, dim) for item in items) or not 0 <= dim < len(first):
        raise TypeError(f"{[item.shape for item in items]} are not put next to each other along dim {dim}")
    sizes = [item.shape[dim] for item in items]
    blocks = [
        replace(block, start=_changed(block.start, dim, block.start[dim] + before))
        for item, before in zip(items, accumulate(sizes, initial=0))
        for block in item.blocks
    ]
    return Layout(_changed(first, dim, sum(sizes)), tuple(blocks))


def _stacked(items: Sequence[Layout], dim: int = 0) -> Layout:
    if any(block.stacked is not None for item in items for block in item.blocks):
        raise TypeError("a tensor of the files is stacked once")
    rows = [
        Layout(
            _with(item.shape, dim, 1),
            tuple(
                Block(block.key, _with(block.start, dim, 0), _with(block.shape, dim, 1), dim) for block in item.blocks
            ),
        )
        for item in items
    ]
    return _side_by_side(rows, dim)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim:])


def _changed(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
