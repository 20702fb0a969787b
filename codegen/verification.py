"""Run every distinct kernel against the reference of its region, and say which one is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..ir.cache_rounding import rounds_cache
from ..ir.dump import dump
from ..ir.errors import VerificationError
from ..ir.graph import Graph, type_of
from ..ir.quantized import rounds_rows
from ..ir.reproduction import write_reproduction
from ..ir.twin import shortened, widened, windows_of
from . import interpreted
from .check import CODES_TOLERANCE, TOLERANCE, errors, random_case
from .kernels import Kernel, kernel_file
from .launch import load_launch
from .signature import fresh_outputs

# The interpreter takes about a minute for a kernel that reads ten million numbers.
_SECONDS = 60.0
_LARGEST = 4_000_000
_GPU_CASES = ((1, 1), (3, 3), (67, 4))

_TEST = '''\
"""{title}. Fails until codegen is mended."""

from pathlib import Path

import torch

from fuseline import ir
from fuseline.codegen.verification import error_of


def test_{stem}() -> None:
    graph = ir.parse(Path(__file__).with_name("{stem}.txt").read_text())
    error = error_of(graph, torch.device("{device}"))
    assert error <= {tolerance}, f"relative RMSE {{error:.1e}}"
'''


@dataclass(frozen=True)
class KernelsChecked:
    """How many kernels were run against their reference, and why others were not, by name."""

    checked: int
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        rest = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
        return f"{self.checked} kernels agree with their references" + (f", not checked: {rest}" if rest else "")


def verify_kernels(kernels: Sequence[Kernel], device: torch.device, folder: str | Path | None = None) -> KernelsChecked:
    """Run each kernel on random inputs: on the GPU as it is, else in Triton's interpreter in fp32, with short windows.

    Args:
        folder: where a reproduction is written; by default ``fuseline-verification/`` in the current directory.

    Raises:
        VerificationError: a kernel computes other numbers than the graph lines it came from. ``site`` is its name.
    """
    left_out: dict[str, str] = {}
    if device.type == "cuda":
        found = {kernel.name: (_on_gpu(kernel, device), "") for kernel in kernels}
    elif find_spec("triton") is None:
        return KernelsChecked(0, {kernel.name: "triton is not installed" for kernel in kernels})
    else:
        twins = [_twin(kernel) for kernel in sorted(kernels, key=_work) if _work(kernel) <= _LARGEST]
        sources = {twin.name: twin.source for twin in twins}
        found = interpreted.interpret_kernels(sources, {twin.name: dump(twin.graph) for twin in twins}, _SECONDS)
        why = "too large to be interpreted"
        left_out = {kernel.name: why for kernel in kernels if kernel.name not in found}
    for kernel in kernels:
        tolerance = _tolerance(kernel.graph, device)
        error, why = found.get(kernel.name, (0.0, ""))
        if not error <= tolerance:
            raise _blame(kernel, error, why, tolerance, device, folder)
    return KernelsChecked(len(found), left_out)


def error_of(graph: Graph, device: torch.device) -> float:
    """The relative RMSE of the kernel that a region becomes; for reproductions."""
    kernel = Kernel(graph.name, kernel_file(graph), graph)
    if device.type == "cuda":
        return _on_gpu(kernel, device)
    twin = _twin(kernel)
    return interpreted.interpret_kernels({twin.name: twin.source}, {twin.name: dump(twin.graph)}, 600.0)[twin.name][0]


def _on_gpu(kernel: Kernel, device: torch.device) -> float:
    launch = load_launch(kernel)
    plain = tuple(range(len(kernel.order)))  # `load_launch` takes the region's own order
    cases = [random_case(kernel.graph, *case, seed=7, device=device) for case in _GPU_CASES]
    found = [max(errors(kernel.graph, launch, plain, case)) for case in cases]
    return max(math.inf if math.isnan(error) else error for error in found)


def _twin(kernel: Kernel) -> Kernel:
    """The kernel in fp32 and with short windows, emitted anew if it differs."""
    graph = shortened(widened(kernel.graph), windows_of(kernel.graph))
    if dump(graph) == dump(kernel.graph):
        return kernel
    return Kernel(kernel.name, kernel_file(graph), graph)


def _work(kernel: Kernel) -> int:
    """Numbers that the kernel reads, for one token: small kernels are interpreted first."""
    return sum(math.prod(size for size in type_of(n).shape if isinstance(size, int)) for n in kernel.graph.inputs())


def _tolerance(graph: Graph, device: torch.device) -> float:
    rounded = [*graph.inputs(), *fresh_outputs(graph)] if device.type == "cuda" else []
    allowed = [TOLERANCE.get(type_of(node).torch_dtype, 0.0) for node in rounded]
    if rounds_rows(graph) or rounds_cache(graph):
        allowed.append(CODES_TOLERANCE)
    return max([TOLERANCE[torch.float32], *allowed])


def _blame(
    kernel: Kernel, error: float, why: str, tolerance: float, device: torch.device, folder: str | Path | None
) -> VerificationError:
    text = dump(kernel.graph)
    title = f"The kernel {kernel.name} differs from its region: relative RMSE {error:.1e}, {tolerance:.0e} allowed"
    stem = f"kernel_{kernel.name}"
    test = _TEST.format(title=title, stem=stem, device=device.type, tolerance=tolerance)
    files = write_reproduction(None if folder is None else Path(folder), stem, text, test)
    reason = f"It cannot be run: {why}. " if why else ""
    regions = ", ".join(sorted({view.nodes[-1].name for view in kernel.views}))
    return VerificationError(
        f"{title} (it makes {regions}). {reason}It was emitted for\n{text}Reproduction: {files[0]}, {files[1]}",
        pass_name="codegen",
        site=kernel.name,
        error=error,
        tolerance=tolerance,
        files=files,
    )
