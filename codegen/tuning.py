"""Measure the tilings of an emitted matmul against each other on the GPU, and choose for every number of rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .exchange import Exchange
from .precompile import Wanted, wanted_by

Choices = tuple[tuple[int | None, int], ...]
"""Each for up to so many rows which of a file's ``CONFIGS``; the last, without a bound, for all others."""

Arguments = Callable[[int], Sequence[Sequence[Tensor]]]
"""Several sets of arguments for a launch on so many rows. Together they should exceed the cache of the GPU."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are measured: those of decoding. Others take the next larger, or what the file says itself."""

LIBRARY_ROWS = 32
"""From how many rows on the library's product is measured, too."""


@dataclass(frozen=True)
class Timing:
    """``micros`` of one launch of ``CONFIGS[config]`` on so many rows."""

    rows: int
    config: int
    micros: float


def candidates(module: ModuleType, rows: int) -> list[int]:
    """The tilings of a file that make sense for so many rows, as indices of ``CONFIGS``."""
    found = []
    for index, config in enumerate(module.CONFIGS):
        blocks = config.get("constexprs")
        if blocks is None:  # the library's product
            fits = rows >= LIBRARY_ROWS
        elif "BLOCK_M" in blocks:
            fits = rows > 1 and min(rows, 64) <= blocks["BLOCK_M"] <= max(16, 2 * rows)
        else:
            fits = rows <= 4
        if fits:
            found.append(index)
    return found


def wanted(
    module: ModuleType, arguments: Arguments, rows_of: Sequence[int], exchange: Exchange | None = None
) -> list[Wanted]:
    """The kernels of all candidates that are not compiled in this process, those that send to other ranks as well.

    ``exchange``: that of a kernel that sends in a step, while it is measured alone without.
    """
    found: dict[Wanted, None] = {}
    for rows in rows_of:
        values = arguments(rows)[0]
        for config in candidates(module, rows):
            launch = partial(module.launch, *values, choices=((None, config),))
            for given in [launch, *([partial(launch, ranks=exchange)] if exchange else [])]:
                found.update(dict.fromkeys(wanted_by(given)))
    return list(found)


def measure(module: ModuleType, arguments: Arguments, rows_of: Sequence[int], workers: int = 8) -> Iterator[Timing]:
    """Time every candidate, for one number of rows after the other. One that spills or does not fit is left out."""
    usable: dict[int, bool] = {}
    for rows in rows_of:
        sets = arguments(rows)
        wanted = candidates(module, rows)
        fresh = [config for config in wanted if config not in usable]
        fits = partial(_fits, module, sets[0])
        with ThreadPoolExecutor(workers) as pool:  # the assembler is a process of its own
            usable.update(zip(fresh, pool.map(fits, fresh)))
        for config in wanted:
            if usable[config]:
                yield Timing(rows, config, _micros(module, sets, config, apart=rows > 16))


def choose(module: ModuleType, timings: Sequence[Timing], margin: float = 0.01) -> Choices:
    """The fastest tiling for each number of rows that was measured; above them what the file says itself.

    What the file says stays unless another is faster by the ``margin``: a difference below it is noise.
    """
    found: list[tuple[int | None, int]] = []
    for rows in sorted({timing.rows for timing in timings}):
        times = {item.config: item.micros for item in timings if item.rows == rows}
        best = min(times, key=lambda config: times[config])
        own = next(config for most, config in module.CHOICES if most is None or rows <= most)
        if own in times and times[own] * (1 - margin) <= times[best]:
            best = own
        found.append((rows, best))
    largest = found[-1][0] if found else 0
    assert largest is not None
    found += [(most, config) for most, config in module.CHOICES if most is None or most > largest]
    return tuple(found)


def _fits(module: ModuleType, arguments: Sequence[Tensor], config: int) -> bool:
    if arguments[0].is_cuda:
        torch.cuda.set_device(arguments[0].device)  # each thread has a current GPU of its own
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        compiled = module.launch(*arguments, choices=((None, config),))
    except (CompilationError, OutOfResources, PTXASError):
        return False
    except RuntimeError as error:
        if "PassManager" not in str(error):  # what Triton raises where one of its passes fails on a kernel
            raise
        return False
    return getattr(compiled, "n_spills", 0) in (0, None)


def _micros(module: ModuleType, sets: Sequence[Sequence[Tensor]], config: int, apart: bool, repeats: int = 5) -> float:
    """Median microseconds of a launch, from replays of a CUDA graph that launches once with each set.

    Kernels for few rows begin before the one in front of them has ended, as they do in a step. Those for many rows do
    not, and would hide each other's ends back to back: if ``apart``, a small kernel lies between them.
    """
    module.launch(*sets[0], choices=((None, config),))  # what it keeps between launches is made outside of the graph
    graph: Any = torch.cuda.CUDAGraph()
    between = torch.empty(1, device=sets[0][0].device)
    with torch.cuda.graph(graph):
        for values in sets:
            if apart:
                between.zero_()
            module.launch(*values, choices=((None, config),))
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * float(begin.elapsed_time(end)) / len(sets))
    return statistics.median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
