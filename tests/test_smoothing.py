"""SmoothQuant: rows divided and weights multiplied by a vector from a calibration, against numpy, in graphs and in kernels."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import restored, rounded, rounded_rows, wide
from test_dynamic_quantization import PROJECTION, tilings
from test_quantization import BODY, HEAD

import fuseline
from fuseline.codegen.kernels import emit_kernels
from fuseline.ir.errors import VerificationError
from fuseline.ir.parse import parse
from fuseline.ir.quantized import dequantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.passes import quantize as quantize_pass
from fuseline.passes import run
from fuseline.runtime import compile as compile_module
from fuseline.runtime.calibration import smoothing as smoothing_module
from fuseline.runtime.calibration.activations import calibrate
from fuseline.runtime.calibration.smoothing import smoothing

SCHEME = scheme_of("int8d")
assert SCHEME is not None
GRAPH = HEAD.format(wanted="*: int8d").replace("):", ", smoothing: option(True)):") + BODY


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which some columns are much larger, and a matrix."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.where(torch.arange(96) % 17 == 3, 60.0, 1.0)
    return torch.randn(300, 96, generator=generator) * sizes, torch.randn(40, 96, generator=generator)


def lost(rows: np.ndarray, matrix: np.ndarray, vector: np.ndarray) -> float:
    """The squared error of the product of what numpy rounds."""
    left, right = (restored(*rounded(item, "int8-dynamic")) for item in (rows / vector, matrix * vector))
    return float(np.square(left.astype(np.float64) @ right.T - rows.astype(np.float64) @ matrix.T).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_vector_is_the_one_of_the_definition_that_loses_least(seed: int) -> None:
    rows, matrix = (item.numpy() for item in case(seed))
    sizes = np.abs(rows).max(0), np.abs(matrix).max(0)
    tried = [sizes[0] ** a / sizes[1] ** (1 - a) for a in smoothing_module._STRENGTHS]
    tried = [(item / np.exp(np.log(item).mean())).astype(np.float32) for item in tried]
    wanted = min(tried, key=lambda item: lost(rows, matrix, item))
    found = smoothing(*case(seed), SCHEME).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert lost(rows, matrix, found) < 0.2 * lost(rows, matrix, np.ones(96, np.float32))


def test_columns_that_were_never_seen_stay_as_they_are() -> None:
    rows, matrix = case()
    rows[:, 5], matrix[:, 9] = 0, 0
    found = smoothing(rows, matrix, SCHEME)
    assert found[5] == found[9] == 1 and found.isfinite().all() and (found > 0).all()
    assert smoothing(0 * rows, matrix, SCHEME).eq(1).all()
    large = smoothing((rows * 500).half(), matrix.half(), SCHEME)
    assert large.dtype == torch.float32 and large.isfinite().all() and (large > 0).all()


def test_the_graph_says_what_is_smoothed() -> None:
    text = str(run(parse(GRAPH), ["Quantize"]))
    assert "a_smoothing: f32[64] = nn.smoothing(a)" in text
    assert "a_smoothed: f32[32, 64] = aten.mul.Tensor(a, a_smoothing)" in text
    assert 'a_smoothed_int8d: int8d[32, 64] = nn.quantize(a_smoothed, "int8d")' in text
    assert 'x_int8d: int8d[T, 64] = nn.quantize(x, "int8d", 1, a_smoothing)' in text
    assert "up: f32[T, 32] = nn.scaled_linear(x_int8d, a_smoothed_int8d, None, f32)" in text
    assert str(parse(text)) == text and str(run(parse(text), ["Quantize"])) == text
    for scheme in ("fp8", "int8"):  # whole codes of rows alone
        assert "nn.smoothing" not in str(run(parse(GRAPH.replace("int8d", scheme)), ["Quantize"]))
    assert "nn.smoothing" not in str(run(parse(GRAPH.replace("True", "False")), ["Quantize"]))


def test_a_weight_that_is_not_multiplied_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = quantize_pass._smoothed
    monkeypatch.setattr(quantize_pass, "_smoothed", lambda *given: (given[2], kept(*given)[1]))
    graph = parse(GRAPH)
    steps = fuseline.passes.verified(graph, fuseline.passes.steps(graph, ["Quantize"]), ["Quantize"], tmp_path)
    with pytest.raises(VerificationError, match="Quantize"):
        list(steps)


CHOICES: dict[str, Any] = {"quantization": "int8-dynamic", "device": "cpu", "max_batch_size": 2, "max_seq_len": 64}


def tokens_for(model: Any) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (24, 48), generator=torch.Generator().manual_seed(3))


def calibrated(model: Any, monkeypatch: pytest.MonkeyPatch, **choices: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A compiled model, and the vectors and weights of its calibration."""
    seen: list[Any] = []

    def watched(*arguments: Any) -> Any:
        seen.append(calibrate(*arguments))
        return seen[0]

    monkeypatch.setattr(compile_module, "calibrate", watched)
    text = fuseline.Calibration(tokens_for(model).tolist())
    return fuseline.compile(model, calibration=text, **CHOICES, **choices), seen[0].values


def rounded_after(
    vector: torch.Tensor, module: torch.nn.Module, given: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor]:
    """The rows that a module reads, divided and rounded."""
    return (rounded_rows(given[0] / vector, "int8-dynamic"),)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2"])
def test_logits_are_those_of_rows_and_weights_smoothed_by_numpy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(family)
    compiled, values = calibrated(model, monkeypatch)
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    for origin, packed in values.items():
        if origin.startswith("nn.smoothing"):
            continue
        parts = list(dict.fromkeys(re.findall(r"([\w.]+)\.weight: f32", origin)))
        vector = next(item for name, item in values.items() if name.startswith("nn.smoothing") and name in origin)
        found = dequantize(packed, TensorType("int8d", (len(packed), len(vector))), torch.float32)
        for part in parts:
            module = modules[part]
            flipped = type(module).__name__ == "Conv1D"
            width = module.weight.shape[1 if flipped else 0]
            with torch.no_grad():
                module.weight.copy_(found[:width].T if flipped else found[:width])
            found = found[width:]
            module.register_forward_pre_hook(partial(rounded_after, vector))
        assert not len(found)
    ids = tokens_for(model)[:4]
    with torch.no_grad():
        exact, expected = model(ids).logits, twin(ids).logits
    ours = compiled(ids).logits
    # The last digit decides what lies half-way between two codes, in few of the rows.
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() <= 1e-4 and errors.max() <= 0.05
    plain = fuseline.compile(model, **CHOICES)
    assert (ours - exact).norm() < 0.95 * (plain(ids).logits - exact).norm()
    assert len(compiled.kernels) == len(plain.kernels)
    assert re.search(r"(\d+) weights by GPTQ, \1 of them smoothed", compiled.report.calibration)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_pass_and_kernel_keeps_the_numbers(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama")
    compiled, _ = calibrated(model, monkeypatch, dtype=dtype, verify=True, dump=tmp_path)
    assert "every pass keeps the numbers" in compiled.report.verification
    late = parse(sorted(tmp_path.glob("*_GroupKernels.txt"))[0].read_text())
    choices = {**CHOICES, "quantization": None, "dtype": dtype}
    again = fuseline.compile(
        late, weights=model, calibration=fuseline.Calibration(tokens_for(model).tolist()), **choices
    )
    ids = tokens_for(model)[:2]
    assert torch.equal(again(ids).logits, compiled(ids).logits)
    # Without the calibration the vectors are 1.
    plain = fuseline.compile(model, **CHOICES, dtype=dtype)
    assert torch.equal(fuseline.compile(late, weights=model, **choices)(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("depth", [160, 72])
def test_kernels_divide_rows(depth: int, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    text = PROJECTION.format(name="smooth", scheme="int8d", dtype="f32", depth=depth, width=48)
    text = text.replace(", *, T", f", s: f32[{depth}], *, T").replace(
        'nn.quantize(n, "int8d")', 'nn.quantize(n, "int8d", 1, s)'
    )
    (kernel,) = emit_kernels(run(parse(text), []))
    path = tmp_path / "smooth.py"
    path.write_text(kernel.source)
    found = pool.submit(tilings, str(path), str(kernel.graph)).result()
    assert {label: error for label, error in found.items() if not error <= 1e-5} == {}
