"""Up to what size ranks meet in their own kernels, and from where on through the library: measured once, when they connect."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codegen.exchange import Exchange
from ..codegen.kernels import Kernel, kernel_file
from ..codegen.launch import load_launch
from ..ir.parse import parse
from .replay import GraphReplay, NotCapturable
from .timing import median_milliseconds

_REGION = """\
def sum_over_ranks(x: bf16[T, {width}], *, T: dim(1, 65536)):
    reduced: bf16[T, {width}] = dist.all_reduce(x, {ranks})
    return [reduced]
"""
_LAUNCHES, _REPEATS = 10, 5


def faster_up_to(exchange: Exchange, library: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> int:
    """The most bytes that the kernels add up over the ranks no slower than ``library``; -1 if they never do.

    All ranks call this together, and may find different numbers.
    """
    places = exchange.places
    graph = parse(_REGION.format(width=places.slot, ranks=places.ranks))
    launch = load_launch(Kernel(graph.name, kernel_file(graph), graph), exchange=exchange)
    limit, rows = -1, 1
    while rows <= places.lines:
        x = torch.zeros(rows, places.slot, dtype=torch.bfloat16, device=device)
        total = torch.empty_like(x)
        try:
            ours = _micros(lambda x=x, total=total: launch(x, total), device, exchange.begin)  # type: ignore[misc]
            theirs = _micros(lambda x=x: library(x), device)  # type: ignore[misc]
        except NotCapturable:
            return places.lines * places.slot * x.itemsize  # what is in no graph is not measured like this
        if ours <= theirs:
            limit = x.nbytes
        rows *= 4
    return limit


def _micros(work: Callable[[], object], device: torch.device, begin: Callable[[], None] = lambda: None) -> float:
    """Median microseconds of a launch, in a CUDA graph of a few."""

    def several(_: int) -> None:
        begin()
        for _ in range(_LAUNCHES):
            work()

    replay = GraphReplay(several, [1], device)
    return 1e3 * median_milliseconds(lambda: replay(1), _REPEATS, device) / _LAUNCHES
