"""Balanced inputs: the vector loses least, weights that make inputs are found, and the model stays the same but for rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import wide

import fuseline
from fuseline.ir.quantized import dequantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.runtime import compile as compile_module
from fuseline.runtime.calibration import activations
from fuseline.runtime.calibration.activations import Calibrated, calibrate
from fuseline.runtime.calibration.balance import balance
from fuseline.runtime.calibration.makers import Maker, maker_of
from fuseline.runtime.calibration.rounding import Inputs, rounded


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with some large columns, and rows whose inputs are of different sizes and depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -1.5, 128)
    columns = torch.where(torch.arange(128) % 19 == 3, 6.0, 1.0)
    return torch.randn(48, 128, generator=generator) * columns, torch.randn(600, 128, generator=generator) @ mixing


def expected(matrix: np.ndarray, shares: np.ndarray, vector: np.ndarray, groups: int) -> float:
    """The error that the definition expects."""
    largest = np.square(matrix * vector).reshape(len(matrix), groups, -1).max(-1).sum(0)
    return float((largest * (shares / vector**2).reshape(groups, -1).sum(-1)).sum())


@pytest.mark.parametrize("scheme", ["int8", "int4g32"])
@pytest.mark.parametrize("shared", [1, 4])
def test_no_other_vector_loses_less(scheme: str, shared: int) -> None:
    (matrix, rows), kind = case(), scheme_of(scheme)
    assert kind is not None
    channels = torch.arange(128) % (128 // shared)
    shares = Inputs.of(rows.T @ rows).shares
    found = balance(matrix, shares, kind, channels).double().numpy()
    given = matrix.double().numpy(), shares.double().numpy()
    least = expected(*given, found[channels], kind.groups(128))
    assert least < 0.9 * expected(*given, np.ones(128), kind.groups(128))
    draws = np.random.default_rng(0)
    for size in (0.003, 0.03, 0.3):
        for _ in range(20):
            other = found * np.exp(size * draws.standard_normal(len(found)))
            assert expected(*given, other[channels], kind.groups(128)) > 0.995 * least


@pytest.mark.parametrize("scheme", ["int8", "int4g32", "uint4g32"])
def test_products_of_balanced_rows_change_less(scheme: str) -> None:
    (matrix, rows), kind = case(), scheme_of(scheme)
    assert kind is not None
    inputs = Inputs.of(rows.T @ rows)
    vector = balance(matrix, inputs.shares, kind, torch.arange(128))
    errors = []
    for change in (vector, torch.ones(128)):
        packed = rounded(matrix * change, inputs.divided(change), kind)
        numbers = dequantize(packed, TensorType(scheme, (48, 128)), torch.float32)
        errors.append(float(((rows / change) @ numbers.T - rows @ matrix.T).norm()))
    assert errors[0] < 0.9 * errors[1]


def test_inputs_that_were_never_seen_are_changed_by_little() -> None:
    (matrix, rows), kind = case(), scheme_of("int8")
    assert kind is not None
    rows[:, 10:20], matrix[:, 15:30] = 0, 0
    for hessian in (rows.T @ rows, torch.zeros(128, 128)):
        vector = balance(matrix, Inputs.of(hessian).shares, kind, torch.arange(128))
        assert vector.isfinite().all() and vector.min() >= 1 / 16 and vector.max() <= 16


def uneven(family: str) -> Any:
    """A model with large weights behind some of the inputs of its projections."""
    model = wide(family)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.weight[:, 3::19] *= 5
    return model


class Watched:
    """What a compile with calibration finds."""

    def __init__(self, model: Any, scheme: str, balanced: bool = True) -> None:
        self.tokens = torch.randint(0, model.config.vocab_size, (24, 48), generator=torch.Generator().manual_seed(3))
        self.makers: list[Maker] = []
        self.found: list[Calibrated] = []
        choices: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "quantization": scheme}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(activations, "maker_of", self.maker_of if balanced else lambda projection: None)
            patch.setattr(compile_module, "calibrate", self.calibrate)
            text = fuseline.Calibration(self.tokens.tolist())
            self.compiled = fuseline.compile(model, calibration=text, **choices)

    def maker_of(self, projection: Any) -> Maker | None:
        made = maker_of(projection)
        self.makers += [made] if made else []
        return made

    def calibrate(self, *arguments: Any) -> Calibrated:
        self.found.append(calibrate(*arguments))
        return self.found[0]


@pytest.mark.parametrize(
    ("family", "makers"),
    [
        ("llama", ["norm", "values", "norm", "up"]),
        ("qwen2", ["norm", "norm", "up"]),  # its values have a bias
        ("gemma2", ["values", "up"]),  # its scales are computed from weights
        ("gpt2", []),  # its norms and values have biases, and its MLPs no gate
    ],
)
def test_makers_are_found(family: str, makers: list[str]) -> None:
    model = wide(family)
    watched = Watched(model, "int8")
    kinds = [
        ("up" if item.weight.args[0].name.endswith("gate_up_weight") else "values") if item.begin else "norm"  # type: ignore[union-attr]
        for item in watched.makers
    ]
    assert kinds == makers * model.config.num_hidden_layers
    assert len(watched.found[0].scales) == kinds.count("norm")
    for item in watched.makers:
        if item.begin:
            assert item.channels.tolist() == (
                list(range(160))
                if item.weight.args[0].name.endswith("gate_up_weight")  # type: ignore[union-attr]
                else [head // 3 * 16 + place for head in range(6) for place in range(16)]
            )


@pytest.mark.parametrize(("family", "scheme"), [("llama", "int8"), ("llama", "uint4g32"), ("gemma2", "int4g32")])
def test_logits_are_nearer_than_of_inputs_as_they_are(family: str, scheme: str) -> None:
    model = uneven(family)
    ours, plain = Watched(model, scheme), Watched(model, scheme, balanced=False)
    assert ours.found[0].error < 0.95 * plain.found[0].error
    ids = ours.tokens[:8]
    with torch.no_grad():
        exact = model(ids).logits
    errors = [(item.compiled(ids).logits - exact).norm() for item in (ours, plain)]
    assert errors[0] < 0.97 * errors[1]


def test_a_scale_is_divided_by_what_its_type_can_hold() -> None:
    maker = next(item for item in Watched(wide("llama"), "int8").makers if not item.begin)
    scale = torch.linspace(0.1, 3, 96).bfloat16()
    scale[5] = 0
    vector = maker.exact(scale, torch.linspace(0.3, 4, 96))
    assert vector[5] == 1
    torch.testing.assert_close(maker.divided(scale, vector).float() * vector, scale.float(), rtol=1e-6, atol=0)


def test_weights_of_several_readers_stay_as_they_are() -> None:
    """Layers that share their norms and projections cannot each divide them by a vector of their own."""
    model = wide("mistral")
    first, *others = model.model.layers
    for layer in others:
        layer.mlp, layer.input_layernorm = first.mlp, first.input_layernorm
        layer.post_attention_layernorm = first.post_attention_layernorm
    watched = Watched(model, "int8")
    assert not watched.found[0].scales
