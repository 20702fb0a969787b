"""Weights given by name for a model without values: asked for where they are used, and nothing kept beyond it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from families import make
from test_tensor_parallel import _OPTIONS, divisible, tokens
from transformers import PreTrainedModel

import fuseline
from fuseline.runtime.bench.random_weights import RandomWeights


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without values."""
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(model.config)
    return made.eval()


class Plain(Mapping[str, torch.Tensor]):
    """A mapping that is no dict."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.held = values

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Given(Plain):
    """Tensors made when they are asked for, with an account of those that are still held."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__(values)
        self.asked: Counter[str] = Counter()
        self.handed: list[tuple[str, weakref.ref[Any]]] = []
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        memory = super().__getitem__(name).detach().numpy().copy()
        self.handed.append((name, weakref.ref(memory)))
        self.most = max(self.most, len([item for item in self.alive() if self.held[item].dim() > 1]))
        return torch.from_numpy(memory)

    def alive(self) -> list[str]:
        return [name for name, item in self.handed if item() is not None]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "deepseek_v3"])
def test_a_model_without_values_takes_them_by_name(name: str) -> None:
    model = make(name)
    _, expected = tokens(model)
    given = Given(dict(model.state_dict()))
    compiled, found = tokens(on_meta(model), weights=given)
    assert found == expected
    assert max(given.asked.values()) == 1
    assert "no model to run" in compiled.report.source_check and "weights were given by name" in str(compiled.report)


@pytest.mark.parametrize("layers", [2, 7])
def test_ranks_hold_one_whole_matrix_at_a_time(layers: int) -> None:
    model = divisible("llama", num_hidden_layers=layers)
    _, expected = tokens(model)
    given = Given(dict(model.named_parameters()))
    compiled, found = tokens(on_meta(model), weights=given, tensor_parallel=2, simulate=True)
    assert found == expected
    assert max(given.asked.values()) == 2, "once for each rank"
    assert given.most <= 1 + 2, "one that is cut at a time, and the embeddings of both"
    assert compiled.report.layers == layers


def test_values_of_other_types_are_converted() -> None:
    model = make("llama")
    half = {name: item.bfloat16() for name, item in model.state_dict().items()}
    model.load_state_dict(half)
    _, expected = tokens(model)
    assert tokens(on_meta(model), weights=half)[1] == expected


@pytest.mark.parametrize("real", [False, True])
def test_buffers_are_those_of_the_config_or_the_callers(real: bool) -> None:
    model = make("llama")
    empty = on_meta(model)
    if real:
        with torch.no_grad():
            model.model.rotary_emb.inv_freq *= 0.5
        empty.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    assert tokens(empty, weights=dict(model.named_parameters()))[1] == tokens(model)[1]


def test_tied_values_stand_under_either_name() -> None:
    model = make("llama-tied")
    _, expected = tokens(model)
    values = dict(model.named_parameters())
    assert "lm_head.weight" not in values
    assert tokens(on_meta(model), weights=values)[1] == expected
    values["lm_head.weight"] = values.pop("model.embed_tokens.weight")
    assert tokens(on_meta(model), weights=values)[1] == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lm_head.weight": None}, r"there is no 'lm_head.weight', and 1 of the model's 21 parameters are missing"),
        (
            {"lm_head.weight": torch.zeros(99, 47)},
            r"'lm_head.weight' is torch.float32 of shape \(99, 47\), the model's",
        ),
        ({"lm_head.weight": torch.zeros(99, 48).char()}, r"'lm_head.weight' is torch.int8 of shape"),
        ({"lm_head.weight": torch.zeros(99, 48, device="meta")}, "'lm_head.weight' is on the meta device"),
        ({"lm_head.weight": 5}, "'lm_head.weight' is no tensor"),
    ],
)
@pytest.mark.parametrize("kind", [dict, Plain])
def test_weights_that_are_not_the_models_are_refused(change: dict[str, Any], why: str, kind: type) -> None:
    model = make("llama")
    values: dict[str, Any] = {**dict(model.named_parameters()), **change}
    values = {name: item for name, item in values.items() if item is not None}
    with pytest.raises(fuseline.WeightsError, match=why):
        tokens(on_meta(model), weights=kind(values))


def test_weights_by_name_are_for_models_without_values() -> None:
    model = make("llama")
    with pytest.raises(fuseline.UnsupportedModelError, match="holds values, and weights gives others"):
        tokens(model, weights={})
    with pytest.raises(fuseline.UnsupportedModelError, match="weights by name are for .* not for a str"):
        tokens("nowhere", weights={})
    with pytest.raises(fuseline.UnsupportedModelError, match=r"on the meta device: .* pass weights=<tensors by name>"):
        tokens(on_meta(model))


def test_random_weights_are_the_same_for_ranks_and_for_one() -> None:
    model = divisible("llama", num_hidden_layers=6)
    empty, options = on_meta(model), {**_OPTIONS, "dtype": torch.float32}
    _, expected = tokens(empty, weights=RandomWeights(empty, "cpu"), **options)
    _, found = tokens(empty, weights=RandomWeights(empty, "cpu"), tensor_parallel=2, simulate=True, **options)
    assert found == expected
    _, other = tokens(empty, weights=RandomWeights(empty, "cpu", seed=1), **options)
    assert other != expected


def test_random_weights_are_spread_as_transformers_spreads_them() -> None:
    model = divisible("llama-tied", hidden_size=128, initializer_range=0.03)
    torch.manual_seed(1)
    like = type(model)(model.config)
    found = RandomWeights(on_meta(model), "cpu")
    assert set(found) == {name for name, _ in like.named_parameters(remove_duplicate=False)}
    for name, item in like.named_parameters():
        made = found[name]
        assert made.shape == item.shape and made.dtype == item.dtype
        assert float(made.std(correction=0)) == pytest.approx(float(item.detach().std(correction=0)), rel=0.05)
        assert float(made.mean()) == pytest.approx(float(item.detach().mean()), abs=0.002)
        assert torch.equal(made, found[name])
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    first, second = (found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(KeyError):
        found["model.layers.9.mlp.up_proj.weight"]
