"""Processes that ``mpirun`` or ``torchrun`` started become one group of torch.distributed."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from .groups import summed
from .mpi import MPIGroup, RankError, watchdog, world
from .nccl import PATIENCE, NCCLGroup
from .options import OptionError
from .ranks import local_rank_of, rank_of, size_of


class _Joined:
    """What ``join`` has made of this process, until it leaves: torch, too, keeps one group of all processes."""

    group: NCCLGroup | GlooGroup | None = None


class GlooGroup:
    """Ranks on the CPU that torchrun started, each a process."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        return summed(self.all_gather(x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """As in ``Group``.

        Raises:
            RankError: another rank did not answer in time, or is gone.
        """
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            distributed.all_gather(parts, own, group=self._group)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"rank {self.rank} of {self.size} cannot reach the others within {watchdog():g} s: one has ended or stopped "
                f"({reason})"
            ) from error
        return parts


def gpu_of_rank() -> torch.device:
    """The GPU of this process among those that a launcher started on this machine.

    Raises:
        OptionError: there are more processes here than GPUs.
    """
    local, count = local_rank_of() or 0, torch.cuda.device_count()
    if local >= count:
        raise OptionError(
            f"rank {rank_of()} is the process {local} of this machine, which has {count} GPUs: start fewer"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def torch_group(size: int, device: torch.device) -> NCCLGroup | GlooGroup:
    """The group of the processes that were started, one for each GPU, or on the CPU.

    They find each other at ``MASTER_ADDR`` and ``MASTER_PORT``, which torchrun sets; by default the first of those that
    mpirun started tells the others.

    Raises:
        OptionError: there are not as many processes.
    """
    gpu = device.type == "cuda"
    if not distributed.is_initialized():
        options: dict[str, Any] = {"timeout": timedelta(seconds=watchdog()), "world_size": size}
        options |= {"device_id": device} if gpu else {}
        if "MASTER_ADDR" in os.environ and size_of() == size:
            options |= {"init_method": "env://", "rank": rank_of()}
        else:
            everyone = world(size)
            options |= {"store": _store(everyone), "rank": everyone.rank}
        distributed.init_process_group("nccl" if gpu else "gloo", **options)
    if distributed.get_world_size() != size:
        raise OptionError(f"tensor_parallel={size}, but {distributed.get_world_size()} processes are in torch's group")
    return _Joined.group or _everyone(device)


def _everyone(device: torch.device) -> NCCLGroup | GlooGroup:
    group = distributed.group.WORLD
    return NCCLGroup(group, device) if device.type == "cuda" else GlooGroup(group)


def store_of_first(size: int) -> Any:
    """Where the first rank, which calls this, and the others of its machine leave what they need to reach each other."""
    timeout = timedelta(seconds=watchdog())
    return distributed.TCPStore("127.0.0.1", 0, size, True, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def join(store: Any, rank: int, size: int, kind: str) -> torch.device:
    """Make this process one of ``size`` ranks of this machine; returns its device. ``store`` is the first one's, or its port."""
    timeout = timedelta(seconds=watchdog())
    if isinstance(store, int):
        store = distributed.TCPStore("127.0.0.1", store, size, False, timeout)  # type: ignore[attr-defined]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    options: dict[str, Any] = {"device_id": device} if kind == "cuda" else {}
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)
    _Joined.group = _everyone(device)
    return device


def let_go() -> None:
    """Have this process wait no longer for other ranks, of which one is gone."""
    if isinstance(_Joined.group, NCCLGroup):
        _Joined.group.let_go()


def leave() -> None:
    """End what ``join`` began; the other ranks have ended."""
    group, _Joined.group = _Joined.group, None
    if isinstance(group, NCCLGroup):
        group.let_go()
        group.end(PATIENCE)
    elif distributed.is_initialized():
        distributed.destroy_process_group()


def _store(everyone: MPIGroup) -> Any:
    """Where ranks learn how to reach the others: at the first one, whose address goes round through MPI."""
    timeout = timedelta(seconds=watchdog())
    hosts = set(_told(everyone, socket.gethostname()))
    address = "127.0.0.1" if len(hosts) == 1 else socket.getfqdn()
    if everyone.rank == 0:
        made = distributed.TCPStore(address, 0, everyone.size, True, timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        _told(everyone, f"{address}:{made.port}")
        return made
    address, _, port = _told(everyone, "")[0].rpartition(":")
    return distributed.TCPStore(address, int(port), everyone.size, False, timeout)  # type: ignore[attr-defined]


def _told(everyone: MPIGroup, text: str) -> list[str]:
    """What each rank says, in at most 256 bytes."""
    said = torch.tensor(list(text.encode().ljust(256)), dtype=torch.uint8)
    return [bytes(item.tolist()).decode().rstrip() for item in everyone.all_gather(said)]
