"""A request while it is served: its tokens, how far the cache knows them, and how its tokens are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..ir.errors import InvalidRequestError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    max_new_tokens  most tokens to generate, at least 1
    temperature     0 is greedy (the other choices are then unused); else logits are divided by it
    top_k           draw among the k most likely tokens; None means all
    top_p           draw among the fewest most likely tokens whose probabilities reach this sum, in (0, 1]
    seed            in [0, 2**64): fixes the draws of this request, whatever it is batched with; None means any
    stop_token_ids  tokens that end the request; the one that does is its last token
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raise InvalidRequestError for the first parameter that cannot be honoured."""
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise _refusal("max_new_tokens", self.max_new_tokens, "pass an integer of at least 1")
        if not _is_real(self.temperature) or not 0 <= self.temperature < math.inf:
            raise _refusal("temperature", self.temperature, "pass a finite number >= 0 (0 is greedy)")
        if self.top_k is not None and (not _is_int(self.top_k) or self.top_k < 1):
            raise _refusal("top_k", self.top_k, "pass an integer of at least 1, or None for all tokens")
        if self.top_p is not None and (not _is_real(self.top_p) or not 0 < self.top_p <= 1):
            raise _refusal("top_p", self.top_p, "pass a number in (0, 1], or None for all tokens")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**64):
            raise _refusal("seed", self.seed, "pass an integer in [0, 2**64), or None for a random one")
        stops = self.stop_token_ids
        if not isinstance(stops, tuple) or not all(_is_int(token) and token >= 0 for token in stops):
            raise _refusal("stop_token_ids", stops, "pass a tuple of token ids, () for none")


def validate_prompt(prompt: list[int], vocab_size: int, name: str = "prompt") -> None:
    """Raise InvalidRequestError unless ``prompt`` is a list of at least one id in [0, vocab_size)."""
    if not isinstance(prompt, (list, tuple)):
        raise InvalidRequestError(f"{name} is of type {type(prompt).__name__}: pass a list of token ids")
    if not prompt:
        raise InvalidRequestError(f"{name} is empty: pass at least one token id")
    for index, token in enumerate(prompt):
        if not _is_int(token):
            raise InvalidRequestError(
                f"{name}[{index}] is {token!r} of type {type(token).__name__}: pass plain integers"
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{name}[{index}] is {token}, outside the vocabulary: "
                f"pass ids in [0, {vocab_size}), from the tokenizer of this model"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refusal(name: str, value: Any, remedy: str) -> InvalidRequestError:
    return InvalidRequestError(f"SamplingParams.{name} is {value!r}: {remedy}")


@dataclass(eq=False, slots=True)
class Sequence:
    """One request and its state. Ids ascend in order of arrival.

    ``num_computed`` tokens have their keys and values in the blocks of ``block_table``, in order; 0 and no blocks
    while the sequence waits, was preempted, or has ended. ``admissions`` counts how often it was given blocks anew.

    A step may be launched before the tokens of the last one are known to the host. Such tokens count in ``num_tokens``
    but are not in ``output`` yet, and the newest is choice number ``row`` of the last step launched; -1 if all are known.
    """

    id: int
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    admissions: int = 0
    row: int = -1
    num_tokens: int = field(init=False)
    max_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt) + len(self.output)
        self.max_tokens = len(self.prompt) + self.params.max_new_tokens

    @property
    def tokens(self) -> list[int]:
        """Prompt and output as far as it is known; a new list."""
        return self.prompt + self.output

    @property
    def last_token(self) -> int:
        """The last token that is known."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def num_generated(self) -> int:
        """Tokens generated, those not known yet included."""
        return self.num_tokens - len(self.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet: 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_closing(self) -> bool:
        """Every token that it may have is generated, known or not: no further step is needed."""
        return self.num_tokens >= self.max_tokens

    def slice_tokens(self, start: int, stop: int) -> list[int]:
        """Tokens ``[start, stop)`` without building ``tokens``; 0 for a token that is not known."""
        prompt = len(self.prompt)
        found = self.output[max(0, start - prompt) : max(0, stop - prompt)]
        if start < prompt:
            found = self.prompt[start:stop] + found
        return found + [0] * (stop - start - len(found))

    def expect(self, row: int) -> None:
        """Count a token that a step was launched for; it is that step's choice number ``row``."""
        self.num_tokens += 1
        self.row = row

    def append(self, token: int) -> None:
        """Take the next token, expected or not, and end the sequence if it is a stop token or the last one allowed."""
        self.output.append(token)
        known = len(self.prompt) + len(self.output)
        if known >= self.num_tokens:
            self.num_tokens = known
            self.row = -1
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif known >= self.max_tokens:
            self.finish_reason = "length"
