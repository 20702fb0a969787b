"""Inputs of a projection are made larger or smaller, and those of its weight the other way, so that rounding loses less."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.schemes import Scheme

# Steps of the descent, and the length of the first in logarithms; they get shorter evenly.
_STEPS = 100
_LENGTH = 0.1
# Of the slopes of the steps before, as in descent with momentum.
_KEPT = 0.9
# An input is changed by so much at most: halves hold what is left of it.
_MOST = 16.0


def balance(matrix: Tensor, shares: Tensor, scheme: Scheme, channels: Tensor) -> Tensor:
    """The vector ``f32 [n]`` of which ``matrix [N, K]`` is to be multiplied with ``vector[channels]``, and its rows divided.

    As AWQ (Lin et al. 2023) it protects inputs that count, but by the error that is to be expected instead of powers of
    sizes. Each code of a group is wrong by as much of the group's factor, so with ``shares [K]``, what an input's error
    counts after GPTQ, and ``v`` the vector it is

        sum over groups: (sum over rows: max of (w v)^2 in the group) * (sum over the group: shares / v^2)

    which is convex in the logarithm of ``v``: descent finds the least of it. Inputs with equal ``channels [K]`` share an
    entry.
    """
    groups = scheme.groups(matrix.shape[1])
    squares = matrix.float().square().reshape(len(matrix), groups, -1)
    counts, places = shares.float().reshape(groups, -1), channels.reshape(groups, -1)
    entries = int(channels.max()) + 1
    logarithms = torch.zeros(entries, device=matrix.device)
    change = total = torch.zeros_like(logarithms)
    for step in range(_STEPS):
        sizes = (2 * logarithms[places]).exp()
        largest, at = (squares * sizes).max(-1)
        lost = counts / sizes
        # The two sums of each group, and how they change with each input.
        above, below = largest.sum(0)[:, None], lost.sum(-1, keepdim=True)
        up = torch.zeros_like(counts).scatter_add_(1, at.t(), largest.t()) * below
        down = lost * above
        rises, falls = (logarithms.new_zeros(entries).index_add_(0, channels, item.flatten()) for item in (up, down))
        # Only a row's largest weight makes a sum rise, and which it is changes with each step: means are of use.
        change, total = _KEPT * change + falls - rises, _KEPT * total + falls + rises
        logarithms += _LENGTH * (1 - step / _STEPS) * change / total.clamp_min(1e-30)
        logarithms -= logarithms.mean()
    return logarithms.exp().clamp(1 / _MOST, _MOST)
