"""Ranks that a launcher started: each makes the same calls, and the first one speaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..join import gpu_of_rank
from ..options import OptionError
from ..parts import groups_of
from .workloads import Stream, Workload


def place_of_rank(ranks: int, device: torch.device, work: Sequence[Workload]) -> torch.device:
    """The device of this rank, once all have met.

    Raises:
        OptionError: there are not as many, or they could not keep together on this work.
    """
    if any(isinstance(item, Stream) and item.rate is not None for item in work):
        raise OptionError(
            "--workloads rates: requests arrive by the clock, and ranks that a launcher started have one each: leave mpirun or "
            "torchrun away, or choose other workloads"
        )
    place = gpu_of_rank() if device.type == "cuda" else device
    groups_of(ranks, False, place)
    return place
