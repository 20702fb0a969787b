"""Ranks that ``mpirun`` started: tensors through MPI's buffer calls, and one end for all of them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import FuselineError, OptionError
from .groups import summed
from .guard import Guard
from .ranks import rank_of, size_of, started_by_mpi

# Seconds that a rank waits for the others: longer than one may take to load its weights while another has done so.
WATCHDOG = 120.0
WATCHDOG_VARIABLE = "FUSELINE_WATCHDOG"
"""The environment variable that sets other seconds."""
# So often a rank looks whether the others' tensors are there before it sleeps in between.
_EAGER = 2000


class RankError(FuselineError, RuntimeError):
    """Ranks do not go together: one did not answer in time, or compiled another graph."""


class MPIGroup:
    """The ranks of a communicator of mpi4py, for tensors on the CPU. Nothing is pickled."""

    def __init__(self, communicator: Any, watchdog: float = WATCHDOG) -> None:
        self._communicator = communicator
        self._watchdog = watchdog
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()

    def all_reduce(self, x: Tensor) -> Tensor:
        return summed(self.all_gather(x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """As in ``Group``.

        Raises:
            RankError: the tensor of a rank, which it names, did not come in time.
        """
        own = x.contiguous()
        parts = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        if not own.numel():
            return parts
        others = [rank for rank in range(self.size) if rank != self.rank]
        coming = [(rank, self._communicator.Irecv(_bytes(parts[rank]), rank)) for rank in others]
        going = [(rank, self._communicator.Isend(_bytes(own), rank)) for rank in others]
        self._wait(coming + going)
        return parts

    def _wait(self, under_way: list[tuple[int, Any]]) -> None:
        until = time.monotonic() + self._watchdog
        looks = 0
        while under_way:
            under_way = [(rank, request) for rank, request in under_way if not request.Test()]
            looks += 1
            if under_way and looks > _EAGER:
                time.sleep(1e-4)
                if time.monotonic() > until:
                    late = ", ".join(map(str, sorted({rank for rank, _ in under_way})))
                    raise RankError(
                        f"rank {self.rank} of {self.size} has waited {self._watchdog:g} s for rank {late}: it has "
                        "stopped, or is much slower than the others"
                    )


def world(size: int) -> MPIGroup:
    """The group of the processes that ``mpirun`` started.

    Raises:
        OptionError: there are not as many, mpi4py is not installed, or ``FUSELINE_WATCHDOG`` is no number of seconds.
    """
    seconds = watchdog()
    started = size_of()
    if started != size:
        found = f"mpirun started {started}" if started else "this process is alone"
        raise OptionError(
            f"tensor_parallel={size} needs as many processes, and {found}: start them with mpirun -n {size} fuseline run "
            f"MODEL PROMPT --tensor-parallel {size} or with torchrun, or run all ranks in this process with simulate=True"
        )
    everyone = _everyone()
    if everyone.Get_size() != size:
        raise OptionError(
            f"mpirun started {size} processes, but mpi4py sees {everyone.Get_size()}: it belongs to another MPI than this "
            "mpirun; use the mpirun that the extra 'mpi' of fuseline installs"
        )
    _guard()
    return MPIGroup(everyone.Dup(), seconds)


def watchdog(environment: Mapping[str, str] = os.environ) -> float:
    """How many seconds a rank waits for the others: what ``FUSELINE_WATCHDOG`` says, or 120.

    Raises:
        OptionError: it says no number greater than 0.
    """
    said = environment.get(WATCHDOG_VARIABLE, "")
    try:
        seconds = float(said or WATCHDOG)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{WATCHDOG_VARIABLE}={said} is no number of seconds greater than 0")
    return seconds


@cache
def _guard() -> Guard:
    """What names this rank if it is killed, one for the life of the process. All ranks make theirs together."""
    from mpi4py import MPI

    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    path = torch.zeros(1024, dtype=torch.uint8)
    if host.Get_rank() == 0:
        made = tempfile.mkdtemp(prefix="fuseline-ranks-").encode()
        path[: len(made)] = torch.frombuffer(bytearray(made), dtype=torch.uint8)
    host.Bcast(_bytes(path), 0)
    host.Free()
    folder = bytes(path.tolist()).rstrip(b"\0").decode()
    return Guard(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), folder)


@contextmanager
def one_job(size: int) -> Iterator[None]:
    """Inside, an exception of one of ``size`` ranks ends all processes, with a message that names the rank.

    Otherwise the others would wait for it for ever.
    """
    rank = rank_of()
    if size == 1 or rank is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not isinstance(error, FuselineError):
            traceback.print_exc()
        what = error.args[0] if isinstance(error, FuselineError) and error.args else repr(error)
        # In one write, so that the line stays whole beside those of other ranks.
        print(f"fuseline: rank {rank} of {size}: {what}\n", end="", file=sys.stderr, flush=True)
        if not started_by_mpi():
            os._exit(1)  # torchrun ends the others; what runs on a GPU may wait for them for ever
        try:
            everyone = _everyone()
        except OptionError:
            raise error from None
        if _guard.cache_info().currsize:
            _guard().dismiss()
        everyone.Abort(1)


def _everyone() -> Any:
    """The communicator of all processes."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # it is not there, or its library is not
        raise OptionError(
            f"ranks meet through mpi4py, which the extra 'mpi' of fuseline installs with mpirun ({error})"
        ) from error
    return MPI.COMM_WORLD


def _bytes(x: Tensor) -> Any:
    """The memory of a contiguous tensor, as MPI's buffer calls take it."""
    return x.reshape(-1).view(torch.uint8).numpy()
