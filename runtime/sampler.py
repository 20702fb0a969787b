"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np
import torch

from ..ir.errors import VerificationError
from .sequence import SamplingParams
from .step import to_device
from .vocabulary import Vocabulary


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
    draw_sampled(logits, params, step_indices, tokens, Vocabulary(logits.shape[1]))
    # One transfer, hence one wait for the device, brings the tokens and the check.
    chosen, healthy = torch.stack((tokens, finite.to(tokens.dtype))).tolist()
    if not all(healthy):
        raise not_finite(healthy.index(0), len(params))
    result: list[int] = chosen
    return result


def draw_sampled(
    logits: torch.Tensor,
    params: list[SamplingParams],
    step_indices: list[int],
    tokens: torch.Tensor,
    vocabulary: Vocabulary,
) -> None:
    """Overwrite the entries of ``tokens`` whose row of ``logits`` is sampled; see ``sample``.

    Of logits in parts of a ``vocabulary``, the rows that are sampled are made whole, and no others. Never waits for the
    device. A row that is not finite gives some token.
    """
    for rows in _groups(params, vocabulary.size, logits.device):
        index = to_device(torch.tensor(rows), logits.device)
        knobs = [_knobs(params[row], step_indices[row], vocabulary.size) for row in rows]
        tokens.index_copy_(0, index, _draw(vocabulary.whole(logits.index_select(0, index)), knobs))


def not_finite(row: int, count: int) -> VerificationError:
    """The error for row ``row`` of ``count`` whose logits are not finite."""
    return VerificationError(
        f"row {row} of {count} rows of logits holds NaN or infinity, so no token can be chosen: "
        "the model overflows in its dtype or a kernel is wrong; compile with verify=True or dtype=torch.float32"
    )


DRAW_BYTES = 40
"""Memory that a draw takes for each logit of the rows that it is made from: the sort of top-p above all."""


def draw_rows(count: int, vocab: int) -> int:
    """Most rows of ``count`` that are drawn together on an accelerator."""
    return min(count, max(1, 2**23 // vocab))


def _uniform(seed: int | None, index: int) -> float:
    """A number in [0, 1), a pure function of seed and index.

    Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
    the seed is its key and the index its counter, so no state has to survive a preemption.
    """
    key = secrets.randbits(64) if seed is None else seed
    return float(int(np.random.Philox(key=key, counter=index).random_raw()) >> 11) * 2.0**-53


class _Knobs(NamedTuple):
    """How one row is drawn; k counts the whole vocabulary and p is 1 where nothing is cut."""

    temperature: float
    k: int
    p: float
    uniform: float


def _knobs(params: SamplingParams, index: int, vocab: int) -> _Knobs:
    return _Knobs(
        params.temperature,
        vocab if params.top_k is None else min(params.top_k, vocab),
        1.0 if params.top_p is None else params.top_p,
        _uniform(params.seed, index),
    )


def _groups(params: list[SamplingParams], vocab: int, device: torch.device) -> list[list[int]]:
    """Rows to draw from, those together that take the same work, in groups that bound the memory of a draw.

    On an accelerator, whose time here goes to launches, groups are large: all that is summed are integers, and the
    rest goes element by element, so a row's draw is still its own. A CPU takes one row at a time, since its vectors
    may treat the last elements of a tensor by other code than the first.
    """
    size = 1 if device.type == "cpu" else draw_rows(len(params), vocab)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, param in enumerate(params):
        if param.temperature > 0:
            kinds.setdefault((param.top_k is None, param.top_p is None), []).append(row)
    return [rows[start : start + size] for rows in kinds.values() for start in range(0, len(rows), size)]


def _draw(logits: torch.Tensor, knobs: list[_Knobs]) -> torch.Tensor:
    """One id for each row of ``logits`` [G, V], as i64[G] on its device. Never waits for the device."""
    table = to_device(torch.tensor(knobs, dtype=torch.float64), logits.device)
    temperature, k, p, uniform = table.unsqueeze(1).unbind(-1)
    weights = _weights(logits, logits.amax(dim=-1, keepdim=True), temperature, logits.shape[1])
    if any(knob.k < logits.shape[1] or knob.p < 1 for knob in knobs):
        weights = weights * _most_likely(logits, temperature, k, p, max(knob.k for knob in knobs))
    sums = weights.cumsum(dim=-1)
    return _first_above(sums, (sums[:, -1:] * uniform).long())


def _weights(values: torch.Tensor, top: torch.Tensor, temperature: torch.Tensor, vocab: int) -> torch.Tensor:
    """Probabilities as integers, in units that let a whole vocabulary sum to at most 2**52.

    Sums of integers are the same in any order of addition, and exact in a double: a parallel scan on a device adds
    in an order that varies, which must not change a draw.
    """
    scale = float(1 << (52 - vocab.bit_length()))
    return (torch.exp((values.double() - top.double()) / temperature) * scale).round().long()


def _most_likely(
    logits: torch.Tensor, temperature: torch.Tensor, k: torch.Tensor, p: torch.Tensor, width: int
) -> torch.Tensor:
    """Mask [G, V] of what top-k and then top-p leave, lower ids first among equal logits.

    ``temperature``, ``k`` and ``p`` are f64[G, 1]; ``width`` is the largest k.
    """
    vocab = logits.shape[1]
    values = logits.topk(width).values if width < vocab else logits.sort(dim=-1, descending=True).values
    likely = torch.arange(width, device=logits.device) < k
    sums = (_weights(values, values[:, :1], temperature, vocab) * likely).cumsum(dim=-1)
    reached = torch.searchsorted(sums, (sums[:, -1:] * p).ceil().long())
    last = torch.minimum(reached, k.long() - 1)
    # Only values come sorted, since the order of equals in a sort on a device may vary: ties go by id here.
    threshold = values.gather(1, last)
    above, equal = logits > threshold, logits == threshold
    return above | (equal & (equal.cumsum(dim=-1) <= last + 1 - above.sum(dim=-1, keepdim=True)))


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per row, the first place where ``sums`` [G, V] exceed ``target`` [G, 1]; in range even if a NaN spoilt them."""
    return torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1).squeeze(1)
