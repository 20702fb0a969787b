"""On a GPU every tiling that tuning may choose gives what the region says, at depths of a few turns of its loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fuseline import ir
from fuseline.codegen.check import TOLERANCE, errors, random_case
from fuseline.codegen.kernels import Kernel, kernel_file
from fuseline.codegen.launch import kernel_path
from fuseline.codegen.offline import load_kernel_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCHEMES = ("bf16", "int8", "int4g128", "uint4g32", "int8d", "fp8")
WIDTH = 320


def region(depth: int, scheme: str, lanes: int) -> ir.Graph:
    """A norm and a projection; with two lanes a gate and what it is for."""
    signature = f"x: bf16[T, {depth}], w: {scheme}[{WIDTH}, {depth}], *, T: dim(1, 8192)"
    lines = [f"mul: bf16[T, {depth}] = nn.rms_norm(x, None, 1e-06)"]
    if scheme in ("int8d", "fp8"):
        lines += [f'codes: {scheme}[T, {depth}] = nn.quantize(mul, "{scheme}")']
        lines += [f"y: bf16[T, {WIDTH}] = nn.scaled_linear(codes, w, None, bf16)"]
    else:
        lines += [f"y: bf16[T, {WIDTH}] = aten.linear(mul, w)"]
    if lanes == 2:
        half = WIDTH // 2
        lines += [f"gate: bf16[T, {half}] = aten.slice.Tensor(y, -1, 0, {half})"]
        lines += [f"up: bf16[T, {half}] = aten.slice.Tensor(y, -1, {half}, {WIDTH})"]
        lines += [f"y_2: bf16[T, {half}] = nn.silu_mul(gate, up)"]
    lines += [f"return [{'y_2' if lanes == 2 else 'y'}]"]
    return ir.parse(f"def region({signature}):\n" + "".join(f"    {line}\n" for line in lines))


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depth", [128, 384, 896])
def test_every_tiling_agrees_with_its_region(depth: int, scheme: str, lanes: int) -> None:
    graph = region(depth, scheme, lanes)
    module = load_kernel_file(kernel_path(Kernel(graph.name, kernel_file(graph), graph)))
    assert len(module.CONFIGS) > 8
    for index, config in enumerate(module.CONFIGS):
        whole_rows = config and "BLOCK_M" not in config["constexprs"]
        for rows in (1, 3) if whole_rows else (3, 16, 64, 67):
            case = random_case(graph, rows, 1, seed=7, device="cuda")
            launch = partial(module.launch, choices=[(None, index)])
            error = max(errors(graph, launch, (0, 1, 2), case))
            assert error <= TOLERANCE[torch.bfloat16], f"{config}, {rows} rows: {error:.1e}"
