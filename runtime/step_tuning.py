"""Choose among tilings that are nearly as fast alone by the time of whole decode steps.

In a step a kernel begins while the one in front ends, and finds the cache as that one left it: what is fastest back to
back with itself may not be there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..codegen.exchange import MirrorExchange
from ..codegen.kernels import Kernel
from ..codegen.launch import cache_directory, load_launches, replace_file
from ..codegen.tuning import Choices, Timing
from ..ir.dist import Mirror
from ..ir.loop import Loop
from ..ir.placement import OPTION as TENSOR_PARALLEL
from .caches import new_caches
from .executor import Executor
from .parts import places_of
from .replay import GraphReplay, NotCapturable
from .step import StepInput
from .timing import median_milliseconds
from .tune import Constants, Tuning, digest_of

Milliseconds = Callable[[Mapping[str, Choices], int], float]
"""The time of a step of so many sequences with these tilings, by the kernel's name."""

# A rival is not much slower alone, and has to win by more than noise.
_RIVALS, _SLOWER, _MARGIN = 5, 1.25, 0.003
_SEQUENCES, _CONTEXT, _REPEATS = 8, 256, 20


def tune_steps(
    tunings: Mapping[str, Tuning],
    kernels: Sequence[Kernel],
    loop: Loop,
    constants: Constants,
    device: torch.device,
    block_size: int,
    max_seq_len: int,
    until: float,
) -> dict[str, Choices]:
    """The tilings of every tuned kernel, by its name: from the record of earlier compiles, else measured.

    Those that are best alone stay where steps cannot be recorded as CUDA graphs.

    Args:
        loop: a model of few layers with all its kernels, of which ``constants`` are the weights.
        until: a time of ``time.perf_counter`` after which nothing more is measured, and nothing recorded.
    """
    first = {name: item.choices for name, item in tunings.items()}
    rows_of = sorted({timing.rows for item in tunings.values() for timing in item.timings if timing.rows <= 64})
    sources = {kernel.name: digest_of(kernel) for kernel in kernels}
    machine = next((item.machine for item in tunings.values()), {})
    context = min(_CONTEXT, max_seq_len)
    search = [_RIVALS, _SLOWER, _MARGIN, _SEQUENCES]
    known = [sources, machine, rows_of, sorted(first.items()), len(loop.stages), context, search]
    record = cache_directory("tuning") / f"step_{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}.json"
    try:
        found = json.loads(record.read_text())["choices"]
        return {name: tuple((most, int(config)) for most, config in found[name]) for name in first}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or one of another version: measure
    if not first or time.perf_counter() > until:
        return first
    steps = _Steps(loop, constants, kernels, device, block_size, context)
    timings = {name: item.timings for name, item in tunings.items()}
    try:
        best, complete = choose_in_steps(first, timings, steps.milliseconds, rows_of, until)
    except NotCapturable:
        return first
    if complete:
        replace_file(record, json.dumps({"machine": machine, "choices": best}, indent=1))
    return best


def choose_in_steps(
    choices: Mapping[str, Choices],
    timings: Mapping[str, Sequence[Timing]],
    milliseconds: Milliseconds,
    rows_of: Sequence[int],
    until: float,
) -> tuple[dict[str, Choices], bool]:
    """Try the rivals of each kernel's tiling, one kernel after the other, for each number of rows.

    Returns the choices, and whether all were tried before ``until``.
    """
    found = dict(choices)
    for rows in rows_of:
        best = milliseconds(found, rows)
        for name in found:
            for config in _rivals(timings[name], found[name], rows):
                if time.perf_counter() > until:
                    return found, False
                trial = {**found, name: tuple((most, config if most == rows else old) for most, old in found[name])}
                took = milliseconds(trial, rows)
                if took < best * (1 - _MARGIN):
                    best, found = took, trial
    return found, True


def _rivals(timings: Sequence[Timing], choices: Choices, rows: int) -> list[int]:
    """Other tilings for so many rows than the chosen one, the fastest alone first."""
    chosen = dict(choices).get(rows)
    times = {timing.config: timing.micros for timing in timings if timing.rows == rows}
    if chosen is None or chosen not in times:
        return []
    near = [config for config in times if config != chosen and times[config] <= _SLOWER * times[chosen]]
    return sorted(near, key=lambda config: times[config])[:_RIVALS]


class _Steps:
    """Decode steps of a model of few layers; each has ``context`` tokens of one of a few sequences behind it."""

    def __init__(
        self,
        loop: Loop,
        constants: Constants,
        kernels: Sequence[Kernel],
        device: torch.device,
        block_size: int,
        context: int,
    ) -> None:
        self._loop, self._constants, self._kernels, self._device = loop, constants, kernels, device
        self._block_size, self._context = block_size, context
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._blocks = -(-context // block_size)
        self._caches = new_caches(loop, (_SEQUENCES + 1) * self._blocks * block_size, device)
        for store in self._caches.values():
            store.zero_()
        # Each rank measures for itself.
        self._group = Mirror(loop.graph.options.get(TENSOR_PARALLEL, 1))
        self._exchange = MirrorExchange(places_of(loop), device) if self._group.size > 1 else None

    def milliseconds(self, choices: Mapping[str, Choices], rows: int) -> float:
        """Median time of a step, replayed as a CUDA graph. Raises NotCapturable if it cannot be recorded."""
        launches = load_launches(self._kernels, choices, self._exchange)
        executor = Executor(
            self._loop, self._constants, self._caches, self._device, launches, None, self._group, self._exchange
        )
        step = self._step(rows)

        def compute(_: int) -> None:
            executor(step)

        replay = GraphReplay(compute, [rows], self._device, self._stream)
        return median_milliseconds(lambda: replay(rows), _REPEATS, self._device)

    def _step(self, rows: int) -> StepInput:
        def count(dtype: torch.dtype, many: int = rows) -> torch.Tensor:
            return torch.arange(many, dtype=dtype, device=self._device)

        # Rows write to a block of nobody's, and read those of a sequence.
        table = count(torch.int32, self._blocks)[None, :]
        return StepInput(
            tokens=count(torch.int64) % 16,
            positions=torch.full((rows,), self._context - 1, device=self._device),
            slots=_SEQUENCES * self._blocks * self._block_size + count(torch.int64) % self._block_size,
            query_starts=count(torch.int32, rows + 1),
            context_lens=torch.full((rows,), self._context, dtype=torch.int32, device=self._device),
            block_tables=(count(torch.int32) % _SEQUENCES)[:, None] * self._blocks + table,
            rows=count(torch.int64),
        )
