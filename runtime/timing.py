"""How long something takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch


def median_milliseconds(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median time of ``work`` after one call that is not counted.

    On a GPU the calls are asked for one right after the other, and the device's own clock says how long each took.
    """
    work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
        return median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return float(median(before.elapsed_time(after) for before, after in pairwise(marks)))
