"""What an engine tells of its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .sequence import FinishReason


class TokenEvent(NamedTuple):
    """A token was generated; ``finish_reason`` is set if it is the last of its sequence."""

    sequence_id: int
    token: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Stats:
    """Totals since the engine was made.

    steps           calls of the model
    tokens          tokens generated
    preemptions     times a sequence lost its blocks and had to be computed again
    prefill_tokens  tokens computed from prompts, again after a preemption (generated ones too), or for scores
    decode_tokens   generated tokens fed back one at a time
    """

    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
