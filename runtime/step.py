"""What one step of the model reads: every token of a ragged batch and where its keys and values live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepInput:
    """One ragged batch of ``T`` tokens from ``S`` sequences, prefill and decode mixed. All tensors are on one device.

    The tokens of sequence ``s`` are ``tokens[query_starts[s]:query_starts[s + 1]]``. They are the last of the
    ``context_lens[s]`` tokens of the sequence known to the cache once the step has written its own.

    tokens        i64[T]    token ids
    positions     i64[T]    position of each token in its sequence, from 0
    slots         i64[T]    ``block * block_size + offset``: where the keys and values of each token are written
    query_starts  i32[S+1]  offsets into T, from 0 to T
    context_lens  i32[S]    tokens of each sequence in the cache, this step's included
    block_tables  i32[S,B]  blocks of each sequence in order; what lies past its last block is padding, never read
    rows          i64[R]    indices into T of the tokens whose logits are wanted, ascending; R may be 0
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    rows: torch.Tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU tensor on ``device``, by a copy that does not make the host wait for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


Model = Callable[[StepInput], torch.Tensor]
"""Writes the keys and values of the step's tokens to the cache and returns logits of ``rows``: [R, V], or the columns that this
process has of them (see ``Vocabulary``)."""
