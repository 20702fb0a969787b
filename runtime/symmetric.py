"""Memory that the GPUs of all ranks map, each rank in a process of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.dist import Group


class _Process:
    """What torch counts for as long as a process lives, and so do we."""

    mapped = 0


def mapped(words: int, device: torch.device, group: Group, process_group: Any) -> tuple[Tensor, list[int], Any]:
    """Zeros that all ranks can write to, the addresses of all ranks' ones, and what keeps them mapped.

    All ranks call this together.

    Raises:
        RuntimeError: the GPUs cannot map each other's memory, or some of the processes have mapped memory before and
            others have not: torch numbers what it exchanges over the life of a process, and they would wait for ever.
        ImportError: torch is without symmetric memory.
    """
    import torch.distributed._symmetric_memory as symmetric

    before = {int(item.item()) for item in group.all_gather(torch.tensor([_Process.mapped]))}
    if len(before) > 1:
        raise RuntimeError("the first rank has mapped memory before, with processes that are gone: start a new one")
    _Process.mapped += 1
    mine = symmetric.empty(words, dtype=torch.int64, device=device)
    handle = symmetric.rendezvous(mine, process_group)
    mine.zero_()
    return mine, [int(address) for address in handle.buffer_ptrs], handle
