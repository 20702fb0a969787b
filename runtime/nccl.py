"""Ranks on GPUs, a process each: NCCL for what is large, memory that all of them write to for what is small."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ..codegen.exchange import Exchange, Places
from ..ir.dist import Group
from .exchange_limit import faster_up_to
from .mpi import RankError, watchdog
from .symmetric import mapped

# So often the host looks whether a step is done before it sleeps in between.
_EAGER = 100_000
PATIENCE = 10.0
"""Seconds after which a GPU that still waits for ranks that are gone, or a group that does not end, is given up."""


class NCCLGroup:
    """The ranks of a process group of torch, each on a GPU of its own."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self.device = device
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self.gone: Callable[[], str] = str
        """Says which rank has ended, if that is known; else nothing."""
        self._exchange: SymmetricExchange | None = None
        self._ending: Thread | None = None

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
        """Wait until the device has come to an event. Once a rank is gone, nothing on the device waits for it.

        Raises:
            RankError: another rank, which it names, keeps it waiting for longer than ``FUSELINE_WATCHDOG`` says.
        """
        seconds = watchdog()
        patience = min(5.0, seconds / 2)  # is left for finding out which rank it is
        until, looks = time.monotonic() + seconds - patience, 0
        while not event.query():
            looks += 1
            if looks > _EAGER:
                time.sleep(2e-5)
                if looks % 1000 == 0 and (said := self.gone()):
                    self.let_go()
                    raise RankError(said)
            if time.monotonic() > until:
                late = ", ".join(map(str, self._silent(patience))) or "another one"
                self.let_go()
                raise RankError(
                    f"rank {self.rank} of {self.size} has waited {seconds:g} s for a step that needs all ranks: rank {late} "
                    "has stopped, or is much slower than the others"
                )

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that do not say within so many seconds, as this one does now, that they wait for the others."""
        store = distributed.distributed_c10d._get_default_store()
        said, patience = f"fuseline/{self.rank}", timedelta(seconds=seconds)
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

    def let_go(self) -> None:
        """Have nothing on the device wait for ranks that are gone: it goes on with numbers that mean nothing."""
        self.end()
        idle = Thread(target=_synchronize, args=(self.device,), daemon=True)
        idle.start()
        until = time.monotonic() + PATIENCE
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]
            while idle.is_alive() and time.monotonic() < until:
                if self._exchange is not None and not self._exchange.why:
                    self._exchange.answer()
                idle.join(0.001)

    def end(self, seconds: float = 0.0) -> None:
        """End the group without the other ranks, which may be gone; wait so many seconds for that at most.

        NCCL's kernels stop at once. The rest waits for the CUDA graphs that hold some of them.
        """
        if self._ending is None:
            self._ending = Thread(target=_abort, daemon=True)
            self._ending.start()
        self._ending.join(seconds)

    def connect(self, places: Places) -> SymmetricExchange:
        """Memory that the kernels of all ranks write to. All ranks call this together."""
        self._exchange = exchange = SymmetricExchange(self, self._group, places)
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
            mine, addresses = mapped(places.words, group.device, group)
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


def settle(group: Group) -> None:
    """Wait until the device of a rank has done what it was asked for, if ranks are on GPUs.

    Raises:
        RankError: another rank is gone, or as ``NCCLGroup.wait``.
    """
    if not isinstance(group, NCCLGroup):
        return
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(group.device))
    group.wait(event)
    if said := group.gone():
        raise RankError(said)


def _abort() -> None:
    with suppress(RuntimeError, ValueError):  # the group had an end already
        distributed.distributed_c10d._abort_process_group()


def _synchronize(device: torch.device) -> None:
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
