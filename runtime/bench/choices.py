"""Reads the sizes that a user writes: ``1,8,64``, ``64x128``, ``64-1024``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..options import OptionError, positive
from .workloads import Batch, Range, Stream, Workload

_WORKLOADS = ("decode", "prefill", "mixed", "rates")


@dataclass(frozen=True)
class Choices:
    """The workloads asked for by name, and their sizes as written on the command line."""

    workloads: str
    batches: str
    prompt: int
    new: int
    prefill: str
    requests: int
    prompts: str
    outputs: str
    rates: str
    rate_seconds: float
    seed: int

    def read(self) -> list[Workload]:
        """The workloads in the order of their names.

        Raises:
            OptionError: there is no such workload, or a size makes no sense.
        """
        found: list[Workload] = []
        for name in names(self.workloads):
            if name not in _WORKLOADS:
                raise OptionError(f"--workloads {name}: there is no such workload; use some of {','.join(_WORKLOADS)}")
            found += getattr(self, f"_{name}")()
        if not found:
            raise OptionError(f"--workloads names nothing to measure; use some of {','.join(_WORKLOADS)}")
        return found

    def _decode(self) -> list[Batch]:
        positive("--prompt", self.prompt)
        if self.new < 2:
            raise OptionError(f"--new {self.new}: a decode step takes at least 2 tokens to be seen")
        batches = [_whole("--batches", item) for item in names(self.batches)]
        return [Batch("decode", batch, self.prompt, self.new, self.seed) for batch in batches]

    def _prefill(self) -> list[Batch]:
        batch, length = _pair("--prefill", self.prefill, "x", "64x128")
        return [Batch("prefill", batch, length, 1, self.seed)]

    def _mixed(self) -> list[Stream]:
        count = positive("--requests", self.requests)
        return [Stream("mixed", count, *self._ranges(), seed=self.seed)]

    def _rates(self) -> list[Stream]:
        found = []
        for item in names(self.rates):
            rate = _above_zero("--rates", item)
            count = max(1, round(rate * _above_zero("--rate-seconds", str(self.rate_seconds))))
            found.append(Stream("rates", count, *self._ranges(), rate, self.seed))
        return found

    def _ranges(self) -> tuple[Range, Range]:
        made = []
        for option, text in (("--prompts", self.prompts), ("--outputs", self.outputs)):
            least, most = _pair(option, text, "-", "64-1024")
            if least > most:
                raise OptionError(f"{option} {text}: the least comes first")
            made.append((least, most))
        return made[0], made[1]


def names(text: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _whole(option: str, text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise OptionError(f"{option} {text}: give whole numbers of at least 1")
    return int(text)


def _pair(option: str, text: str, mark: str, example: str) -> Range:
    found = re.fullmatch(rf"([1-9][0-9]*){mark}([1-9][0-9]*)", text.strip())
    if found is None:
        raise OptionError(f"{option} {text}: give two whole numbers of at least 1, like {example}")
    return int(found[1]), int(found[2])


def _above_zero(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise OptionError(f"{option} {text}: give numbers above 0")
    return value
