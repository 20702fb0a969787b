"""SmoothQuant: columns in which rows are large are made smaller, and those of the weight larger (Xiao et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.quantized import dequantize, quantize
from ...ir.schemes import Scheme
from ...ir.types import TensorType

# How much of the difference in size between the columns of rows goes into the weight.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Rows whose products are compared.
_ROWS = 1024
# A column is changed by so much at most.
_MOST = 1e4


def smoothing(rows: Tensor, matrix: Tensor, scheme: Scheme) -> Tensor:
    """The vector ``f32 [K]`` that rows ``[T, K]`` are to be divided by, and ``matrix [N, K]`` multiplied with.

    It is ``max|x|^a / max|w|^(1 - a)`` for each column, with the ``a`` for which the product of both, rounded, has the
    least squared error on some of the rows; or 1, if that is better.
    """
    some = rows[:: max(1, len(rows) // _ROWS)].float()
    wide = matrix.float()
    exact = some @ wide.t()
    sizes = rows.abs().amax(0).float(), wide.abs().amax(0)
    best, least = torch.ones_like(sizes[0]), torch.inf
    for vector in (best, *(_vector(*sizes, strength) for strength in _STRENGTHS)):
        found = _restored(some / vector, scheme) @ _restored(wide * vector, scheme).t()
        error = float((found - exact).square().sum(dtype=torch.float64))
        if error < least:
            best, least = vector, error
    return best


def _vector(rows: Tensor, weights: Tensor, strength: float) -> Tensor:
    """The vector for columns of those sizes. Its mean is 1 as factors go, and columns that are all 0 stay as they are."""
    known = (rows > 0) & (weights > 0)
    logarithms = torch.where(known, strength * rows.log() - (1 - strength) * weights.log(), 0.0)
    mean = logarithms.sum() / known.sum().clamp_min(1)
    return torch.where(known, (logarithms - mean).exp().clamp(1 / _MOST, _MOST), 1.0)


def _restored(matrix: Tensor, scheme: Scheme) -> Tensor:
    """The numbers of a matrix that was rounded to nearest."""
    kind = TensorType(scheme.name, tuple(matrix.shape))
    return dequantize(quantize(matrix, scheme), kind, torch.float32)
