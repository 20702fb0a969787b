"""Columns that ranks have, put next to each other: by a kernel where ranks meet in kernels, else through their group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codegen.exchange import Exchange
from ..codegen.launch import load_gather
from ..ir.dist import Group


def gathering(group: Group, exchange: Exchange | None) -> Callable[[Tensor], Tensor]:
    """What makes ``[R, ranks * W]`` of the ``[R, W]`` that each rank has; all ranks call it together."""
    if exchange is None:
        return lambda x: torch.cat(group.all_gather(x), 1)
    launch = load_gather(group.size)

    def gathered(x: Tensor) -> Tensor:
        whole = x.new_empty(x.shape[0], group.size * x.shape[1])
        return whole if launch(x, whole, exchange) else torch.cat(group.all_gather(x), 1)

    return gathered
