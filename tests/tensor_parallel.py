"""Several ranks in tests: threads that interpret a graph, and ``mpirun``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from fuseline.ir.dist import Group
from fuseline.ir.graph import Graph
from fuseline.ir.interpret import interpret
from fuseline.runtime.groups import simulated

_SOURCE = Path(__file__).parent.parent / ".src"
# A mpirun of the environment first, as the wheels of MPICH bring it.
_MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(
    _MPIRUN is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpirun and mpi4py"
)

# A package without its front door: a module of it is imported without the compiler and transformers, in a third of the time.
LIGHT = f"""
import sys, types
package = types.ModuleType("fuseline")
package.__path__ = [{str(_SOURCE / "fuseline")!r}]
sys.modules["fuseline"] = package
"""


def on_ranks(
    graph: Graph, ranks: int, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> list[tuple[Tensor, ...]]:
    """The results of a graph as each rank has it."""

    def run(group: Group) -> tuple[Tensor, ...]:
        return interpret(graph, inputs, weights, group=group)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, simulated(ranks)))


def mpirun(
    count: int, *arguments: str, flags: tuple[str, ...] = (), within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The end of ``count`` Pythons that were started with these arguments; ``within`` is a command that starts mpirun."""
    path = os.pathsep.join([str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*within, str(_MPIRUN), *flags, "-n", str(count), sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
