"""Run emitted kernels where there is no GPU: in the interpreter of Triton, in a process of its own.

Triton decides at import whether it interprets or compiles, so the process that asks cannot do it itself.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Tokens and sequences of each case: decode of two, and a ragged step of more rows than one program takes.
CASES = ((2, 2), (37, 3))

Outcome = tuple[float, str]
"""An error, and why the kernel could not be run, if so."""

# The package without its front door, which imports transformers and takes seconds.
_START = """
import sys, types
package = types.ModuleType("fuseline")
package.__path__ = [sys.argv[1]]
sys.modules["fuseline"] = package
from fuseline.codegen.interpreted import main
main()
"""


def interpret_kernels(sources: Mapping[str, str], graphs: Mapping[str, str], seconds: float) -> dict[str, Outcome]:
    """The largest relative RMSE of each kernel against the reference of its region, over ``CASES``, in fp32; infinite, with
    the reason, if it cannot be run.

    Args:
        sources, graphs: the file of each kernel and the text of its region, by the kernel's name.
        seconds: the time for all of them. Kernels that it does not suffice for are left out of the result.

    Raises:
        RuntimeError: the process failed; holds what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            Path(folder, f"{name}.py").write_text(source)
        work = json.dumps([(name, str(Path(folder, f"{name}.py")), graphs[name]) for name in sources])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _START, str(Path(__file__).absolute().parents[1])]
        try:
            done = subprocess.run(command, input=work, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as late:
            return dict(_read(late.stdout))
    if done.returncode:
        raise RuntimeError(f"interpreting kernels failed:\n{done.stderr}")
    return dict(_read(done.stdout))


def _read(printed: str | bytes | None) -> Iterator[tuple[str, Outcome]]:
    text = printed.decode() if isinstance(printed, bytes) else printed or ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            name, error, why = json.loads(line)
            yield name, (float(error), why)


def interpret_one(path: str, text: str) -> Outcome:
    """The outcome of one kernel file. Only where Triton interprets."""
    from ..ir.parse import parse
    from .check import errors, random_case
    from .kernels import Kernel
    from .offline import load_kernel_file

    graph = parse(text)
    order = Kernel(graph.name, "", graph).order
    accept_bounds_of_loops()
    try:
        launch = load_kernel_file(path).launch
        found = [max(errors(graph, launch, order, random_case(graph, *case, seed=7, device="cpu"))) for case in CASES]
    except Exception as error:
        return math.inf, f"{type(error).__name__}: {error}"
    return max(math.inf if math.isnan(error) else error for error in found), ""


def accept_bounds_of_loops() -> None:
    """Let the interpreter of Triton 3.6 take tensors as bounds of a loop under NumPy 2.5, as later versions do: it makes an
    integer of an array that holds one number, which NumPy refuses by now."""
    import triton
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor
    if plain.__module__ == __name__ or not triton.__version__.startswith("3.6."):
        return

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def main() -> None:
    """Print the error of each kernel that stdin names as soon as it is known, one line of JSON each."""
    for name, path, text in json.load(sys.stdin):
        print(json.dumps([name, *interpret_one(path, text)]), flush=True)
