"""Ranks on GPUs, a process each: NCCL for what is large, memory that all of them write to for what is small."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ..codegen.exchange import Exchange, Places
from .exchange_limit import faster_up_to
from .mpi import RankError, watchdog
from .symmetric import mapped

# So often the host looks whether a step is done before it sleeps in between.
_EAGER = 100_000


class NCCLGroup:
    """The ranks of a process group of torch, each on a GPU of its own."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self.device = device
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self.gone: Callable[[], str] = str
        """Says which rank has ended, if that is known; else nothing."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        distributed.all_reduce(total, group=self._group)
        return total.to(x.device)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        own = x.to(self.device).contiguous()
        found = own.new_empty(self.size, *own.shape)
        distributed.all_gather_into_tensor(found, own, group=self._group)
        return list(found.to(x.device).unbind())

    def wait(self, event: Any) -> None:
        """Wait until the device has come to an event.

        Raises:
            RankError: another rank, which it names, keeps it waiting for longer than ``FUSELINE_WATCHDOG`` says.
        """
        seconds = watchdog()
        until, looks = time.monotonic() + seconds, 0
        while not event.query():
            looks += 1
            if looks > _EAGER:
                time.sleep(2e-5)
                if looks % 1000 == 0 and (said := self.gone()):
                    raise RankError(said)
            if time.monotonic() > until:
                late = ", ".join(map(str, self._silent())) or "another one"
                raise RankError(
                    f"rank {self.rank} of {self.size} has waited {seconds:g} s for a step that needs all ranks: rank {late} "
                    "has stopped, or is much slower than the others"
                )

    def _silent(self) -> list[int]:
        """The ranks that do not say, as this one does now, that they wait for the others."""
        store = distributed.distributed_c10d._get_default_store()
        said, patience = f"fuseline/{self.rank}", timedelta(seconds=5)
        try:
            store.set(said, "waits")
        except RuntimeError:
            return [0]  # where the store is
        silent = []
        for rank in range(self.size):
            try:
                store.wait([f"fuseline/{rank}"], patience)
            except RuntimeError:
                silent.append(rank)
                patience = timedelta(seconds=0.1)
        return silent

    def connect(self, places: Places) -> SymmetricExchange:
        """Memory that the kernels of all ranks write to. All ranks call this together."""
        exchange = SymmetricExchange(self, self._group, places)
        if not exchange.why:
            found = faster_up_to(exchange, exchange.all_reduce, self.device)
            exchange.limit = int(self.all_gather(torch.tensor([found]))[0].item())
        return exchange


class SymmetricExchange(Exchange):
    """Kernels meet over NVLink or PCIe, in memory that each GPU maps; what is more than ``limit`` bytes goes through NCCL.

    Where GPUs cannot map each other's memory, all goes through NCCL: ``why`` says what stands in the way.
    """

    def __init__(self, group: NCCLGroup, process_group: Any, places: Places) -> None:
        self._process_group = process_group
        self.limit, self.why = 1 << 62, ""
        mine, addresses = torch.zeros(1, dtype=torch.int64, device=group.device), [0] * group.size
        try:
            mine, addresses, self._handle = mapped(places.words, group.device, group, process_group)
        except RankError:  # nobody is there to go through NCCL with
            raise
        except (RuntimeError, ImportError) as error:
            self.why = str(error).strip().partition("\n")[0]
        torch.cuda.synchronize(group.device)
        # Nobody writes before all have zeros; and all do as the others do.
        if not all(item.item() for item in group.all_gather(torch.tensor([not self.why]))):
            self.limit = -1
            self.why = self.why or "another rank cannot map the memory of this one"
        super().__init__(places, mine, addresses, group.rank)

    def summary(self) -> str:
        """How ranks meet, for the report."""
        if self.why:
            return f"through NCCL ({self.why})"
        return f"up to {self.limit / 1024:.0f} KiB in memory that all GPUs map, more through NCCL"

    def takes(self, rows: int, width: int, nbytes: int) -> bool:
        return nbytes <= self.limit and super().takes(rows, width, nbytes)

    def holds(self, words: int) -> bool:
        return not self.why and super().holds(words)

    def all_reduce(self, x: Tensor) -> Tensor:
        distributed.all_reduce(x, group=self._process_group)
        return x
