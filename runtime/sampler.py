"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

import secrets

import numpy as np
import torch

from ..ir.errors import VerificationError
from .sequence import SamplingParams


def sample(logits: torch.Tensor, params: list[SamplingParams], step_indices: list[int]) -> list[int]:
    """One token for each row of ``logits`` [R, V], of any float dtype.

    Row ``r`` is chosen by ``params[r]`` as token number ``step_indices[r]`` (from 0) of its request: the most likely
    token at temperature 0 (the lowest id among equals), else temperature, then top-k, then top-p, then one draw that
    depends on nothing but the row, the request's seed and that number. A seed of None draws afresh at each call.

    Raises VerificationError if a logit is NaN or infinite, and ValueError if the lengths differ.
    """
    if not len(logits) == len(params) == len(step_indices):
        raise ValueError(f"{len(logits)} rows of logits for {len(params)} params and {len(step_indices)} indices")
    if not params:
        return []
    top, tokens = logits.max(dim=-1)
    # Both extremes carry a NaN on: together they are finite exactly when every logit is.
    finite = torch.isfinite(top) & torch.isfinite(logits.amin(dim=-1))
    for row, (param, index) in enumerate(zip(params, step_indices, strict=True)):
        if param.temperature > 0:
            tokens[row] = _draw(logits[row], param, _uniform(param.seed, index))
    # One transfer, hence one wait for the device, brings the tokens and the check.
    chosen, healthy = torch.stack((tokens, finite.to(tokens.dtype))).tolist()
    if not all(healthy):
        raise VerificationError(
            f"row {healthy.index(0)} of {len(params)} rows of logits holds NaN or infinity, so no token can be chosen: "
            "the model overflows in its dtype or a kernel is wrong; compile with verify=True or dtype=torch.float32"
        )
    result: list[int] = chosen
    return result


def _uniform(seed: int | None, index: int) -> float:
    """A number in [0, 1), a pure function of seed and index.

    Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
    the seed is its key and the index its counter, so no state has to survive a preemption.
    """
    key = secrets.randbits(64) if seed is None else seed
    return float(int(np.random.Philox(key=key, counter=index).random_raw()) >> 11) * 2.0**-53


def _draw(row: torch.Tensor, params: SamplingParams, uniform: float) -> torch.Tensor:
    """The id of the token drawn from ``row`` [V], as a tensor of no dimension on its device. Never waits for it."""
    weights = _weights(row, row.max(), params.temperature, row.numel())
    kept = _most_likely(row, params)
    if kept is not None:
        weights = weights * kept
    sums = weights.cumsum(0)
    return _first_above(sums, (sums[-1:].double() * uniform).long())


def _weights(values: torch.Tensor, top: torch.Tensor, temperature: float, vocab: int) -> torch.Tensor:
    """Probabilities as integers, in units that let a whole vocabulary sum to at most 2**52.

    Sums of integers are the same in any order of addition, and exact in a double: a parallel scan on a device adds
    in an order that varies, which must not change a draw.
    """
    scale = float(1 << (52 - vocab.bit_length()))
    return (torch.exp((values.double() - top.double()) / temperature) * scale).round().long()


def _most_likely(row: torch.Tensor, params: SamplingParams) -> torch.Tensor | None:
    """Mask [V] of the tokens that top-k and top-p leave, lower ids first among equal logits; None if all are left."""
    if params.top_k is not None:
        values = row.topk(min(params.top_k, row.numel())).values
    elif params.top_p is not None:
        values = row.sort(descending=True).values
    else:
        return None
    last = torch.full((1,), values.numel() - 1, device=row.device)
    if params.top_p is not None:
        sums = _weights(values, values[0], params.temperature, row.numel()).cumsum(0)
        last = torch.searchsorted(sums, (sums[-1:].double() * params.top_p).ceil().long()).clamp(max=last)
    # Only values come sorted, since the order of equals in a sort on a device may vary: ties go by id here.
    threshold = values[last]
    above, equal = row > threshold, row == threshold
    return above | (equal & (equal.cumsum(0) <= last + 1 - above.sum()))


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first of ``sums`` [V] above ``target`` [1]; in range even if a NaN made garbage of both."""
    return torch.searchsorted(sums, target, right=True).clamp(max=sums.numel() - 1)[0]
