"""The work that is measured: batches that decode or prefill, and streams of requests; all drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

Range = tuple[int, int]
"""A least and a most number of tokens, both included."""


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens to answer it with, and when it arrives: seconds from the start of the run."""

    prompt: list[int]
    new_tokens: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Batch:
    """``batch`` prompts of ``prompt`` tokens at once, then ``new`` tokens for each; ``name`` is decode or prefill."""

    name: str
    batch: int
    prompt: int
    new: int
    seed: int = 0

    @property
    def label(self) -> str:
        tail = f"+{self.new}" if self.name == "decode" else ""
        return f"{self.name} {self.batch} x {self.prompt}{tail}"

    @property
    def concurrency(self) -> int:
        """The most sequences at a time."""
        return self.batch

    @property
    def longest(self) -> int:
        """The most tokens of one sequence, prompt and answer."""
        return self.prompt + self.new

    def prompts(self, vocab: int, run: int) -> list[list[int]]:
        """The prompts of a run: others each time, so that nobody can remember them; a smaller batch has the first ones."""
        draw = random.Random(f"{self.seed} {run}")
        return [_tokens(draw, vocab, self.prompt) for _ in range(self.batch)]


@dataclass(frozen=True)
class Stream:
    """``count`` requests with prompts and answers of random length, all at once or (``rate``) so many a second.

    Arrivals at a rate are a Poisson process: the waits between them are exponential.
    """

    name: str
    count: int
    prompt: Range
    new: Range
    rate: float | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        at = f" at {self.rate:g}/s" if self.rate is not None else ""
        return f"{self.name} {self.count} requests{at}"

    @property
    def concurrency(self) -> int:
        """The most sequences at a time."""
        return self.count

    @property
    def longest(self) -> int:
        """The most tokens of one sequence, prompt and answer."""
        return self.prompt[1] + self.new[1]

    def requests(self, vocab: int, run: int) -> list[Request]:
        """The requests of a run, in order of arrival. Lengths and arrivals are the same in each run, tokens are not."""
        sizes, tokens, now = random.Random(self.seed), random.Random(f"{self.seed} {run}"), 0.0
        made = []
        for _ in range(self.count):
            length, new = sizes.randint(*self.prompt), sizes.randint(*self.new)
            now += sizes.expovariate(self.rate) if self.rate is not None else 0.0
            made.append(Request(_tokens(tokens, vocab, length), new, now))
        return made


Workload = Batch | Stream


def _tokens(draw: random.Random, vocab: int, count: int) -> list[int]:
    return draw.choices(range(vocab), k=count)
