"""GPTQ: weights are rounded so that the products with given rows change least (Frantar et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.quantized import nearest, pack, plain_factors
from ...ir.schemes import Scheme

# Factors are tried down to a part of the one that reaches the largest weight.
_SHRINKS = tuple(1 - step / 40 for step in range(25))
# Of the mean of the Hessian's diagonal, added to it: rows that were not seen are there as well.
_DAMPING = 0.01
# Columns that are rounded one by one before the others hear of their errors.
_BLOCK = 128


@dataclass(frozen=True)
class Inputs:
    """What rounding needs to know of the rows that a matrix ``[N, K]`` is multiplied with.

    order   ``i64 [K]``: the inputs, in the order in which they are rounded, the largest first
    root    ``f32 [K, K]``: the upper Cholesky factor of the inverse of the Hessian, in that order
    """

    order: Tensor
    root: Tensor

    @staticmethod
    def of(hessian: Tensor) -> Inputs:
        """``hessian f32 [K, K]`` is the sum of ``x^T x`` over the rows ``x``."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return Inputs(order, _inverse_root(hessian[order][:, order]))

    @property
    def shares(self) -> Tensor:
        """What the squared error of each input's weight counts, ``f32 [K]``, when those that are rounded after it have made
        up for it: the inverse of an entry of the inverse (Optimal Brain Surgeon, Hassibi and Stork 1993)."""
        found = torch.empty_like(self.root.diagonal())
        found[self.order] = self.root.diagonal().square().reciprocal()
        return found

    def divided(self, vector: Tensor) -> Inputs:
        """The same for rows that are divided by ``vector f32 [K]``."""
        return Inputs(self.order, self.root * vector[self.order])


def rounded(matrix: Tensor, inputs: Inputs, scheme: Scheme) -> Tensor:
    """``matrix [N, K]`` in the bytes of a scheme, ``u8 [N, scheme.row_bytes(K)]``.

    Columns are rounded one by one, each to the nearest code; its error is made up for by the columns that are still to
    come. The factors of all groups are chosen before, by what the error of each input's weight counts then.
    """
    wide, depth = matrix.float(), matrix.shape[1]
    order, root = inputs.order, inputs.root
    factors, zeros = _factors(wide, inputs.shares, scheme)
    width = depth // scheme.groups(depth)
    spread = factors.repeat_interleave(width, 1)
    offsets = None if zeros is None else zeros.repeat_interleave(width, 1)
    left = wide[:, order]
    codes = torch.empty_like(wide)
    for begin in range(0, depth, _BLOCK):
        columns = range(begin, min(begin + _BLOCK, depth))
        errors = torch.empty_like(left[:, begin : columns.stop])
        for column in columns:
            place = order[column]
            factor, offset = spread[:, place], None if offsets is None else offsets[:, place]
            code = nearest(left[:, column], factor, offset, scheme)
            codes[:, place] = code
            number = (code if offset is None else code - offset) * factor
            error = (left[:, column] - number) / root[column, column]
            left[:, column : columns.stop] -= error[:, None] * root[column, column : columns.stop]
            errors[:, column - begin] = error
        left[:, columns.stop :] -= errors @ root[begin : columns.stop, columns.stop :]
    return pack(codes, factors, zeros, scheme)


def _factors(matrix: Tensor, shares: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Factors and zero points ``[N, groups]``, those of the least squared error, with what each input's ``shares [K]``."""
    groups = matrix.reshape(matrix.shape[0], scheme.groups(matrix.shape[1]), -1)
    share = shares.reshape(groups.shape[1:])
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    for shrink in _SHRINKS:
        factors, zeros = plain_factors(groups * shrink, scheme)
        codes = nearest(groups, factors, zeros, scheme)
        numbers = (codes if zeros is None else codes - zeros) * factors
        error = ((numbers - groups).square() * share).sum(-1, keepdim=True)
        if best is None:
            best, least = (factors, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better, factors, best[0]),
            None if zeros is None or best[1] is None else torch.where(better, zeros, best[1]),
        )
    assert best is not None
    return best[0].squeeze(-1), None if best[1] is None else best[1].squeeze(-1)


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the Hessian, with some of its mean added to the diagonal."""
    mean = hessian.diagonal().mean().clamp_min(1e-30)
    damped = hessian + torch.eye(len(hessian), device=hessian.device) * (_DAMPING * mean)
    # Rounding may leave it short of positive definite.
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damped = damped + torch.eye(len(hessian), device=hessian.device) * (_DAMPING * mean)
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return root
