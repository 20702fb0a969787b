"""``verify=True`` with several ranks: graphs of one rank are run for all of them, and kernels as they meet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import wide
from test_tensor_parallel import tokens
from triton_interpreter import interpreted_by

import fuseline
from fuseline import ir, passes
from fuseline.codegen import round_rows
from fuseline.codegen.kernels import emit_kernels
from fuseline.codegen.verification import verify_kernels
from fuseline.ir import dist
from fuseline.passes import localize, sink_cuts
from fuseline.passes.comparison import TOLERANCE
from fuseline.passes.reproduction import error_of


@pytest.fixture(scope="module", autouse=True)
def kernels_are_interpreted(pool: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with interpreted_by(pool, tmp_path_factory.mktemp("kernels")):
        yield


def test_every_pass_and_kernel_keeps_the_numbers(tmp_path: Path) -> None:
    model = wide("llama")
    options: dict[str, Any] = {"quantization": "int8-dynamic", "kv_cache": fuseline.KVCacheConfig(dtype="int8")}
    _, expected = tokens(model, **options)
    compiled, found = tokens(model, tensor_parallel=2, simulate=True, verify=True, dump=tmp_path, **options)
    assert found == expected
    said = r"every pass keeps the numbers; \d+ kernels agree with their references"
    assert re.fullmatch(said, compiled.report.verification)


LAYER = """\
def layer(x: f32[T, 32], *, T: dim(1, 64), tensor_parallel: option(2)):
    u: f32[128, 32] = weight("u.weight")
    d: f32[32, 64] = weight("d.weight")
    b: f32[32] = weight("d.bias")
    up: f32[T, 128] = aten.linear(x, u)
    left: f32[T, 64] = aten.slice.Tensor(up, -1, 0, 64)
    right: f32[T, 64] = aten.slice.Tensor(up, -1, 64, 128)
    act: f32[T, 64] = nn.silu_mul(left, right)
    down: f32[T, 32] = aten.linear(act, d, b)
    add: f32[T, 32] = aten.add.Tensor(down, x)
    norm: f32[T, 32] = nn.rms_norm(add, None, 1e-05)
    return norm
"""
_NAMES = ["Shard", "Localize", "GroupKernels"]


def verified(text: str, folder: Path) -> ir.Graph:
    graph = ir.parse(text)
    (*_, last) = passes.verified(graph, passes.steps(graph, _NAMES, check=True), _NAMES, folder)
    return last.graph


def test_no_alarm_is_false(tmp_path: Path) -> None:
    graph = verified(LAYER, tmp_path)
    assert "dist.receive" in str(graph) and not list(tmp_path.iterdir())


def swapped(given: Callable[..., Any]) -> Callable[..., Any]:
    """Slices of a rank's part that take one half for the other."""

    def wrong(*arguments: Any) -> Any:
        x, dim, start, end = given(*arguments)
        return x, dim, 64 - end, 64 - start

    return wrong


@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [
        (localize, "local_slice", swapped(localize.local_slice)),
        (sink_cuts, "_replaced", lambda value, others: value),  # what is cut is computed from what is whole
        (dist, "spans", lambda sections, ranks, rank: [(0, size // ranks) for size in sections]),
    ],
    ids=["slices", "cuts", "parts"],
)
def test_a_part_that_is_another_is_found(
    place: Any, name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LAYER.replace('weight("u.weight")\n', 'weight("u.weight")\n    v: f32[128, 32] = aten.mul.Tensor(u, 2.0)\n')
    text = text.replace("aten.linear(x, u)", "aten.linear(x, v)")
    with monkeypatch.context() as patch:
        patch.setattr(place, name, wrong)
        with pytest.raises(fuseline.VerificationError) as caught:
            verified(text, tmp_path)
        error = caught.value
        assert error.pass_name in ("Shard", "Localize") and not error.error <= error.tolerance
        before = ir.parse(error.files[0].read_text())
        assert not error_of(error.pass_name, before) <= TOLERANCE, "the reproduction shows it"
    assert error_of(error.pass_name, before) <= TOLERANCE, "and nothing else"


def test_a_kernel_that_takes_one_part_for_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """\
def rounded(x: f32[T, 48], m: f32[T, 2], w: int8d[16, 48], *, T: dim(1, 64)):
    with kernel("down"):
        codes: int8d[T, 48] = nn.quantize(x, "int8d", 1, None, m)
        y: f32[T, 16] = nn.scaled_linear(codes, w, None, f32)
    return y
"""
    given = round_rows._given
    monkeypatch.setattr(round_rows, "_given", lambda *arguments: given(*arguments).split(", ")[0].partition("(")[2])
    with pytest.raises(fuseline.VerificationError, match="The kernel down differs from its region"):
        verify_kernels(emit_kernels(ir.parse(text)), torch.device("cpu"), tmp_path)
