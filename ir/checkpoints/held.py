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
    """What a checkpoint holds: rounded matrices by the name that the plain weight would have, and other tensors."""

    method: str
    matrices: Mapping[str, Held]
    others: Mapping[str, Tensor]

    def values(self) -> dict[str, Tensor]:
        """The rounded matrices in the bytes of their schemes, and the orders of inputs, by name."""
        orders = {order_name(name): item.order for name, item in self.matrices.items() if item.order is not None}
        return {**{name: item.rows() for name, item in self.matrices.items()}, **orders}


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
