"""Times one participant on one workload, and looks at what it generated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .peers import NotMeasured, Peer, Served
from .results import Measurement
from .workloads import Batch, Request, Stream

CHECKED_SEQUENCES, CHECKED_TOKENS = 8, 8
"""How many answers of a run are compared with the model's, and how many tokens of each."""


@dataclass
class Reference:
    """The model's own first tokens after some prompts; ``exact`` if a right participant must have the same."""

    exact: bool
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def check(self, prompts: Sequence[list[int]], found: Sequence[list[int]]) -> tuple[str, bool]:
        """A sentence on how ``found`` compares, and whether it can be right.

        Rounding may turn a token where two are nearly as likely, and all that follow it. So in a rounded type only the
        first tokens count, and only if most of them are others is something wrong.
        """
        pairs = [
            (self.answers[tuple(prompt)], one) for prompt, one in zip(prompts, found) if tuple(prompt) in self.answers
        ]
        if not pairs:
            return "", True
        same = sum(wanted[: len(one)] == one[: len(wanted)] for wanted, one in pairs)
        first = sum(wanted[0] == one[0] for wanted, one in pairs)
        if self.exact:
            return f"same {same}/{len(pairs)}", same == len(pairs)
        return f"first {first}/{len(pairs)}, same {same}/{len(pairs)}", len(pairs) < 4 or 2 * first >= len(pairs)


@dataclass(frozen=True)
class Clock:
    """How often to repeat: ``repeats`` times, but not again once ``seconds`` are spent."""

    repeats: int
    seconds: float

    def runs(self) -> Iterator[int]:
        """The numbers of the runs, while there is time; at least one."""
        begin = time.perf_counter()
        for run in range(self.repeats):
            yield run
            if time.perf_counter() - begin > self.seconds:
                break


def measure_batch(peer: Peer, work: Batch, vocab: int, clock: Clock, reference: Reference, item: Measurement) -> None:
    """Fill ``item`` in: a decode step is what a run takes beyond a run of one token, divided by the tokens beyond."""
    decoding = work.name == "decode"
    if not decoding and not peer.prefills:
        raise NotMeasured("its prefill is eager's; only the decode step is compiled")
    begin = time.perf_counter()
    peer.generate(work.prompts(vocab, -1), min(work.new, peer.warm_tokens or work.new))
    if decoding:
        peer.generate(work.prompts(vocab, -2), 1)
    item.details["warm_up_s"] = time.perf_counter() - begin
    firsts: list[float] = []
    wholes: list[float] = []
    for run in clock.runs():
        prompts = work.prompts(vocab, run)
        if decoding:
            # Other prompts, lest the longer run finds this one's already computed.
            firsts.append(_seconds(peer, work.prompts(vocab, run + clock.repeats), 1)[0])
        elapsed, answers = _seconds(peer, prompts, work.new)
        wholes.append(elapsed)
        _count(answers, [work.new] * work.batch)
        if run == 0 and peer.same_weights:
            item.check, item.right = reference.check(prompts, answers)
    if decoding:
        first = statistics.median(firsts)
        item.runs = [1e3 * (whole - first) / (work.new - 1) for whole in wholes]
    else:
        item.runs = [1e3 * whole for whole in wholes]
    item.ms = statistics.median(item.runs)
    item.tokens_per_s = 1e3 * work.batch * (1 if decoding else work.prompt) / item.ms
    if decoding and (graph := peer.step_ms(work.batch, work.prompt + work.new // 2)) is not None:
        item.details["graph_ms"] = graph


def measure_stream(peer: Peer, work: Stream, vocab: int, clock: Clock, reference: Reference, item: Measurement) -> None:
    """Fill ``item`` in: output tokens a second, times to the first and between the other tokens; the median run counts."""
    begin = time.perf_counter()
    peer.serve(_warm_up(work, vocab, peer.warm_tokens))
    item.details["warm_up_s"] = time.perf_counter() - begin
    found = []
    for run in clock.runs():
        requests = work.requests(vocab, run)
        before = peer.steps()
        served = peer.serve(requests)
        _count([one.tokens for one in served], [request.new_tokens for request in requests])
        found.append((max(one.times[-1] for one in served), requests, served, (peer.steps() or 0) - (before or 0)))
        if run == 0 and peer.same_weights:
            prompts = [request.prompt for request in requests]
            item.check, item.right = reference.check(prompts, [one.tokens for one in served])
    found.sort(key=lambda one: one[0])
    elapsed, requests, served, steps = found[(len(found) - 1) // 2]
    firsts, betweens = latencies(requests, served)
    item.details["ttft_ms"] = _median_and_p99(firsts)
    if betweens:
        item.details["tpot_ms"] = _median_and_p99(betweens)
    if steps:
        item.details["steps"] = steps
    item.tokens_per_s = sum(request.new_tokens for request in requests) / elapsed
    if work.rate is not None and betweens:
        item.runs = [item.details["tpot_ms"][0]]
    else:
        item.runs = [1e3 * one[0] for one in found]
    item.ms = item.runs[0] if work.rate is not None else 1e3 * elapsed


def _warm_up(work: Stream, vocab: int, tokens: int | None) -> list[Request]:
    """All requests at once; for a participant that is soon warm a few, with answers of so many ``tokens``."""
    every = [Request(one.prompt, one.new_tokens) for one in work.requests(vocab, -1)]
    return every if tokens is None else [Request(one.prompt, min(one.new_tokens, tokens)) for one in every[:16]]


def latencies(requests: Sequence[Request], served: Sequence[Served]) -> tuple[list[float], list[float]]:
    """Milliseconds from each request's arrival to its first token, and between tokens for those with more than one."""
    firsts = [1e3 * (one.times[0] - request.arrival) for request, one in zip(requests, served)]
    betweens = [1e3 * (one.times[-1] - one.times[0]) / (len(one.times) - 1) for one in served if len(one.times) > 1]
    return firsts, betweens


def _median_and_p99(values: Sequence[float]) -> list[float]:
    return [float(item) for item in np.percentile(values, [50, 99])]


def _seconds(peer: Peer, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    answers = peer.generate(prompts, new_tokens)
    return time.perf_counter() - begin, answers


def _count(answers: Sequence[list[int]], wanted: Sequence[int]) -> None:
    """Raise RuntimeError unless every answer has as many tokens as were asked for."""
    found = [len(answer) for answer in answers]
    if found != list(wanted):
        wrong = next((place for place, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]), len(found))
        raise RuntimeError(f"answer {wrong} of {len(wanted)} does not have the tokens that were asked for")
