"""Which of several processes this one is, as the launcher says: Open MPI, MPICH (and Slurm's PMI), or torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("RANK", "WORLD_SIZE"),
)
_LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "LOCAL_RANK")


def rank_of(environment: Mapping[str, str] = os.environ) -> int | None:
    """The rank of this process among those that a launcher started; nothing if it is alone."""
    return (_found(environment) or (None, 1))[0]


def size_of(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes a launcher started; nothing if this one is alone."""
    return (_found(environment) or (0, None))[1]


def started_by_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher of this process speaks MPI."""
    return any(name in environment for name, _ in _VARIABLES[:2])


def local_rank_of(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of a launcher's processes on this machine this one is; nothing if the launcher does not say."""
    found = [environment.get(name, "") for name in _LOCAL]
    return next((int(number) for number in found if number.isdecimal()), None)


def _found(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """This process's rank, and of how many."""
    for rank, size in _VARIABLES:
        numbers = environment.get(rank, ""), environment.get(size, "")
        if all(map(str.isdecimal, numbers)) and int(numbers[1]) > 1:
            return int(numbers[0]), int(numbers[1])
    return None


def path_of_rank(path: str | Path, environment: Mapping[str, str] = os.environ) -> Path:
    """A path of this rank's own: ``out/rank0`` for ``out``, ``page.rank0.html`` for ``page.html``; alone, the path itself."""
    path, rank = Path(path), rank_of(environment)
    if rank is None:
        return path
    return path.with_suffix(f".rank{rank}.html") if path.suffix == ".html" else path / f"rank{rank}"
