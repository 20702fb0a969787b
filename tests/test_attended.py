"""Values are rounded by the means that attention takes of their inputs: those of the model's own attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from quantized_models import wide
from torch import Tensor

import fuseline
from fuseline.ir.quantized import dequantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.runtime import compile as compile_module
from fuseline.runtime.calibration.activations import calibrate
from fuseline.runtime.calibration.attended import Values
from fuseline.runtime.calibration.rounding import Inputs, rounded

WINDOWS = [
    torch.randint(0, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (24, 9, 17)
]
READERS = {
    "llama": "model.layers.0.self_attn.v_proj",
    "qwen2": "model.layers.0.self_attn.v_proj",
    "qwen3": "model.layers.0.self_attn.v_proj",
    "gemma2": "model.layers.0.self_attn.v_proj",
    "gpt_oss": "model.layers.0.self_attn.v_proj",
    "phi3": "model.layers.0.self_attn.qkv_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Values, Tensor]]:
    """The Hessians that are computed, in the order of layers."""
    found: list[tuple[Values, Tensor]] = []
    plain = Values.hessian

    def hessian(self: Values, *given: Any) -> Tensor:
        found.append((self, plain(self, *given)))
        return found[-1][1]

    monkeypatch.setattr(Values, "hessian", hessian)
    return found


def compiled(
    model: Any, quantization: Any = "int8", windows: Sequence[Sequence[int]] = WINDOWS
) -> fuseline.CompiledModel:
    wanted = fuseline.Calibration(text=windows)
    return fuseline.compile(
        model, device="cpu", max_batch_size=2, max_seq_len=32, quantization=quantization, calibration=wanted
    )


def means_of(model: Any, reader: str) -> Tensor:
    """The means that the heads of the first layer take of its inputs, by the model itself."""
    model, inputs = copy.deepcopy(model), []
    model.set_attn_implementation("eager")
    hook = model.get_submodule(reader).register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    means = []
    with torch.no_grad():
        for window in WINDOWS:
            chosen = model(torch.tensor([window]), output_attentions=True).attentions[0][0]
            means.append((chosen @ inputs[-1]).flatten(0, 1))
    hook.remove()
    return torch.cat(means)


@pytest.mark.parametrize("name", READERS)
def test_means_are_those_of_the_model(name: str, seen: list[tuple[Values, Tensor]]) -> None:
    """Queries and keys with norms, biases, rotations, caps and sinks of their own, and in one matrix with the values."""
    model = wide(name)
    means = means_of(model, READERS[name]).double()
    compiled(model)
    assert len(seen) == model.config.num_hidden_layers
    wanted = means.T @ means
    # The scale of a norm, which is with the weight then, may be divided from the inputs.
    found = seen[0][1].double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("quantization", ["int8-dynamic", {"*.v_proj": "int4g32", "*": "int8"}])
def test_rounded_rows_and_projections_of_their_own(quantization: Any, seen: list[tuple[Values, Tensor]]) -> None:
    model = wide("llama")
    means = means_of(model, READERS["llama"]).double()
    compiled(model, quantization)
    wanted, found = means.T @ means, seen[0][1].double()
    assert len(seen) == model.config.num_hidden_layers
    if isinstance(quantization, dict):  # queries and keys are rounded already
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_values_of_another_layer_have_weights_of_their_own(seen: list[tuple[Values, Tensor]]) -> None:
    """Norms of queries and keys, which come after the projection, are those of its layer."""
    model = wide("qwen3")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight.fill_(0.0)  # every key is attended alike
    compiled(model, {"*.v_proj": "int8", "*_proj": "int8"}, [WINDOWS[0]])
    inputs: list[Tensor] = []
    model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        model(torch.tensor([WINDOWS[0]]))
    rows = inputs[0].double()
    means = rows.cumsum(0) / torch.arange(1, len(rows) + 1)[:, None]
    wanted = model.config.num_attention_heads * means.T @ means
    assert float((seen[1][1].double() - wanted).norm() / wanted.norm()) < 2e-2


def test_rounding_by_means_keeps_them_better_than_rounding_by_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(300, 64, generator=generator) * torch.logspace(0, -1, 64)
    means = rows.cumsum(0) / torch.arange(1, 301)[:, None]
    matrix, scheme = torch.randn(48, 64, generator=generator), scheme_of("int4g32")
    assert scheme is not None
    errors = []
    for heeded in (means, rows):
        packed = rounded(matrix, Inputs.of(heeded.T @ heeded), scheme)
        numbers = dequantize(packed, TensorType("int4g32", (48, 64)), torch.float32)
        errors.append(float((means @ (numbers - matrix).T).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_rows_of_values_alone_are_rounded_by_means(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []

    def watched(*arguments: Any) -> Any:
        made = calibrate(*arguments)
        found.append(next(rows for origin, rows in made.values.items() if "layers.0" in origin and "v_proj" in origin))
        return made

    monkeypatch.setattr(compile_module, "calibrate", watched)
    model = wide("llama")
    compiled(model)
    monkeypatch.setattr(Values, "hessian", lambda self, rows, *_: torch.eye(rows.shape[1]))
    compiled(model)
    values = model.model.layers[0].self_attn.v_proj.out_features
    assert torch.equal(found[0][:-values], found[1][:-values])
    assert not torch.equal(found[0][-values:], found[1][-values:])
