"""A matrix that a checkpoint holds rounded, and the scheme of ours that is the same codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..quantized import pack
from ..schemes import scheme_of
from .layout import Layout

# Codes that share a factor, in schemes that have groups.
_GROUPS = (128, 64, 32)


class Codes(NamedTuple):
    """Codes ``[N, K]``, factors ``[N, groups]`` and zero points ``[N, groups]`` (or ``None``): a number is
    ``(code - zero point) * factor``."""

    codes: Tensor
    factors: Tensor
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """One rounded matrix ``[N, K]``; ``read`` reads its codes.

    Where the inputs of a group do not follow each other, ``order i64 [K]`` are the inputs in the order of their groups.
    """

    scheme: str
    read: Callable[[], Codes]
    order: Tensor | None = None

    def rows(self) -> Tensor:
        """The matrix in the bytes of its scheme, ``u8 [N, row bytes]``, its inputs in ``order``; codes and factors are
        those of the checkpoint."""
        scheme = scheme_of(self.scheme)
        assert scheme is not None
        codes, factors, zeros = self._ordered()
        repeats = scheme.groups(codes.shape[-1]) // factors.shape[1]
        if zeros is not None:
            zeros = zeros.repeat_interleave(repeats, 1)
        return pack(codes, factors.repeat_interleave(repeats, 1), zeros, scheme)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the codes stand for, ``[N, K]``."""
        codes, factors, zeros = self._ordered()
        groups = codes.float().reshape(*factors.shape, -1)
        if zeros is not None:
            groups = groups - zeros.float().unsqueeze(-1)
        found = (groups * factors.unsqueeze(-1)).flatten(-2).to(dtype)
        return found if self.order is None else found[:, self.order.argsort()]

    def _ordered(self) -> Codes:
        """Codes by group, with factors ``f32 [N, groups]``."""
        codes, factors, zeros = self.read()
        factors = factors.float().reshape(-1, 1) if factors.dim() < 2 else factors.float()
        return Codes(codes if self.order is None else codes[:, self.order], factors.expand(len(codes), -1), zeros)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: rounded ``matrices``, by the name that the numbers would have in its files, and tensors as
    they are.

    ``layouts`` says for each value of the model that is made of matrices, one or one for each expert and part, where they
    lie in it. Those of a value are in one scheme.
    """

    method: str
    matrices: Mapping[str, Held]
    layouts: Mapping[str, Layout]
    others: Mapping[str, Tensor]

    @property
    def schemes(self) -> dict[str, str]:
        """The scheme of each value, by the model's name."""
        return {name: self._first(layout).scheme for name, layout in self.layouts.items()}

    @property
    def orders(self) -> dict[str, Tensor]:
        """The order of a value's inputs, where they have one of their own, by the value's name."""
        found = {name: self._first(layout).order for name, layout in self.layouts.items()}
        return {name: order for name, order in found.items() if order is not None}

    def values(self) -> dict[str, Tensor]:
        """The values in the bytes of their schemes, and the orders of inputs, by name."""
        orders = {order_name(name): order for name, order in self.orders.items()}
        return {**{name: self._rows(layout) for name, layout in self.layouts.items()}, **orders}

    def _first(self, layout: Layout) -> Held:
        return self.matrices[layout.blocks[0].key]

    def _rows(self, layout: Layout) -> Tensor:
        """``u8 [..., row bytes]`` of a value."""
        scheme = scheme_of(self._first(layout).scheme)
        assert scheme is not None
        made = torch.empty(*layout.shape[:-1], scheme.row_bytes(layout.shape[-1]), dtype=torch.uint8)
        for block in layout.blocks:
            place = made
            for dim in range(len(layout.shape) - 1):
                place = place.narrow(dim, block.start[dim], block.shape[dim])
            place.copy_(self.matrices[block.key].rows().reshape(place.shape))
        return made


def order_name(name: str) -> str:
    """The name of the order of a matrix's inputs."""
    return f"{name}.order"


def integer_scheme(module: str, bits: int, depth: int, groups: int, zeros: bool) -> str:
    """The scheme for whole numbers of so many bits with ``groups`` factors in a row of ``depth``.

    Raises:
        UnsupportedModelError: there is none.
    """
    if bits == 8 and groups == 1 and not zeros:
        return "int8"
    size = next((size for size in _GROUPS if depth % groups == 0 and depth // groups % size == 0), None)
    if bits not in (4, 8) or size is None or (bits == 8 and zeros):
        what = f"{bits} bits{' with zero points' if zeros else ''}, {groups} factors for rows of {depth}"
        raise unsupported(
            module,
            f"{what}; what there is: 4 or 8 bits with a factor for each 32, 64 or 128 inputs, 8 bits "
            "with one for a row, and zero points with 4 bits",
        )
    return f"{'u' if zeros else ''}int{bits}g{size}"


def unsupported(module: str, why: str) -> UnsupportedModelError:
    """The refusal of one module's layout."""
    return UnsupportedModelError(f"the checkpoint's {module} is held in a way that cannot be run: {why}")


def order_of(module: str, index: Tensor, groups: int) -> Tensor | None:
    """The inputs in the order of their groups, ``i64 [K]``; nothing if they are in it. ``index [K]`` is the group of each.

    Raises:
        UnsupportedModelError: the groups differ in size.
    """
    order = index.long().argsort(stable=True)
    if not torch.equal(index.long()[order], torch.arange(len(index)) // (len(index) // groups)):
        raise unsupported(module, f"its {groups} groups of inputs differ in size")
    return None if torch.equal(order, torch.arange(len(index))) else order
