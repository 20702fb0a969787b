"""Weights that are read when they are asked for: from files, of which a rank reads its part, and from a mapping."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deep import make_deep
from families import make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tensor_parallel import _OPTIONS, divisible, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import fuseline
from fuseline.ir.checkpoints import files
from fuseline.ir.checkpoints.plain import FileWeights
from fuseline.ir.fold import Fold
from fuseline.ir.skeleton import skeleton
from fuseline.runtime import yardstick
from fuseline.runtime.bench.random_weights import RandomWeights
from fuseline.runtime.groups import simulated
from fuseline.runtime.lower import Wishes, lower
from fuseline.runtime.memory import constant_bytes
from fuseline.runtime.options import KVCacheConfig, Options
from fuseline.runtime.parts import place_parts
from fuseline.runtime.report import Report

CPU = torch.device("cpu")


class Counted:
    """A safetensors file that counts the bytes it hands out, by tensor."""

    read: Counter[str] = Counter()

    def __init__(self, *arguments: Any) -> None:
        self._file = safe_open(*arguments)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._noted(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        whole, noted = self._file.get_slice(name), self._noted

        class Slice:
            get_shape, get_dtype = whole.get_shape, whole.get_dtype

            def __getitem__(self, index: Any) -> torch.Tensor:
                return noted(name, whole[index])

        return Slice()

    def _noted(self, name: str, found: torch.Tensor) -> torch.Tensor:
        Counted.read[name] += found.nbytes
        return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    monkeypatch.setattr(files, "safe_open", Counted)
    monkeypatch.setattr(Counted, "read", Counter())
    return Counted.read


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without values."""
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(model.config)
    return made.eval()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "phi3", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_that_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Converted, tied and kept wide as there, whatever the checkpoint's type and number of files."""
    make(name, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    bones = skeleton(tmp_path, dtype)
    found, expected = bones.lazy(), bones.load()
    assert isinstance(found, FileWeights) and set(found) == set(expected)
    for item, value in expected.items():
        known = found.like(item)
        assert known is not None and known.dtype == value.dtype and known.shape == value.shape
        assert found[item].dtype == value.dtype and torch.equal(found[item], value), item


@pytest.mark.parametrize("name", ["mixtral", "zaya"])
def test_what_is_converted_on_loading_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    """Experts are stacked; a buffer's type is a matter of its own."""
    make(name).save_pretrained(tmp_path)
    assert skeleton(tmp_path, torch.float32).lazy() is None


def _other_names(folder: Path, values: dict[str, torch.Tensor]) -> None:
    values["model.layers.0.mlp.upwards.weight"] = values.pop("model.layers.0.mlp.up_proj.weight")


def _other_shape(folder: Path, values: dict[str, torch.Tensor]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"][:5].clone()


def _both_of_tied(folder: Path, values: dict[str, torch.Tensor]) -> None:
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1


def _adapter(folder: Path, values: dict[str, torch.Tensor]) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("change", [_other_names, _other_shape, _both_of_tied, _adapter])
def test_what_is_not_held_as_it_is_is_left_to_transformers(change: Any, tmp_path: Path) -> None:
    make("llama-tied").save_pretrained(tmp_path)
    assert skeleton(tmp_path, torch.float32).lazy() is not None
    values = load_file(tmp_path / "model.safetensors")
    change(tmp_path, values)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    assert skeleton(tmp_path, torch.float32).lazy() is None


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    model = make("llama-tied")
    model.save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    values = {name.removeprefix("model."): item for name, item in values.items()}
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    found = skeleton(tmp_path, torch.float32).lazy()
    assert found is not None
    assert all(torch.equal(found[name], item) for name, item in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(("name", "layers"), [("llama", 7), ("gpt2", 2), ("phi3", 2)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_its_part_once(name: str, layers: int, ranks: int, read: Counter[str], tmp_path: Path) -> None:
    """Each cut matrix's part, in one or several sections, of either dim; everything else once; the same bits."""
    more = {} if name == "gpt2" else {"num_hidden_layers": layers, "num_key_value_heads": 4}
    divisible(name, **more).save_pretrained(tmp_path)
    bones = skeleton(tmp_path, torch.float32)
    options = Options(CPU, torch.float32, 3, 64, 64, KVCacheConfig(), tensor_parallel=ranks)
    loop = lower(bones, options, Wishes(), Report("cpu", "float32")).loop
    few = loop.short if loop.repeats else loop
    found, whole = bones.lazy(), bones.load()
    assert found is not None and (few is not loop) == (layers > 4)
    planned = constant_bytes(loop, found, CPU)
    assert not read, "the plan reads nothing"
    embeddings = ("embed_tokens.weight", "wte.weight", "wpe.weight")
    matrices = {item: value for item, value in whole.items() if value.dim() == 2 and not item.endswith(embeddings)}
    for group in simulated(ranks):
        read.clear()
        ((part,), (few_part,)) = place_parts(loop, few, found, CPU, {}, [group], iter)
        ((expected,), _) = place_parts(loop, few, whole, CPU, {}, [group], iter)
        for item in matrices.keys() - {"lm_head.weight"}:
            assert read[item] * ranks == matrices[item].nbytes, item
        head = whole["lm_head.weight"].nbytes // ranks
        tied = 0 if read["lm_head.weight"] == head else head  # counted by the name of the embeddings
        rest = sum(read.values()) - sum(read[item] for item in matrices)
        assert rest <= tied + sum(value.nbytes for item, value in whole.items() if item not in matrices)
        assert part.constants.keys() == expected.constants.keys()
        for node, values in expected.constants.items():
            assert all(map(torch.equal, part.constants[node], values)), node
        held = sum(item.nbytes for values in part.constants.values() for item in values)
        assert planned[0].total() >= held
        places = {item.data_ptr() for values in part.constants.values() for item in values}
        assert {item.data_ptr() for values in few_part.constants.values() for item in values} <= places


@pytest.mark.parametrize("layers", [2, 6])
def test_ranks_that_read_parts_generate_the_tokens_of_one(layers: int, tmp_path: Path) -> None:
    divisible("llama", num_hidden_layers=layers).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    _, expected = tokens(tmp_path)
    for ranks in (2, 4):
        compiled, found = tokens(tmp_path, tensor_parallel=ranks, simulate=True)
        assert found == expected and not compiled.report.source_check
    _, expected = tokens(tmp_path, quantization="int8")
    _, found = tokens(tmp_path, quantization="int8", tensor_parallel=2, simulate=True)
    assert found == expected


def test_ranks_in_processes_run_the_layers_that_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Counter[str]
) -> None:
    model = make_deep("gemma2", 9)
    model.save_pretrained(tmp_path)
    bones, fold = skeleton(tmp_path, torch.float32), Fold(9, 2, 7)
    found = bones.lazy()
    assert found is not None and bones.score is not None
    expected = yardstick.run_source(bones.score, fold, 99, 64)
    bones.forget()
    found = bones.lazy()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    seen, said = yardstick.yardstick_of(bones, found or {}, fold, 99, 64, 2)
    assert said == "compared with 7 of its 9 layers: of the others a rank reads its part alone"
    assert [item.prompt for item in seen.few] == [item.prompt for item in expected.few] and not seen.whole
    assert all(torch.equal(ours.logits, theirs.logits) for ours, theirs in zip(seen.few, expected.few))
    layers = {name.split(".")[2] for name in read if ".layers." in name}
    assert layers == set("0123456")
    small = make("llama")
    small.save_pretrained(tmp_path / "small")
    bones = skeleton(tmp_path / "small", torch.float32)
    weights = bones.lazy()
    assert weights is not None
    seen, said = yardstick.yardstick_of(bones, weights, None, 99, 64, 2)
    assert not said and len(seen.whole) == 3
    monkeypatch.setattr(yardstick, "_SMALL", 1000)
    seen, said = yardstick.yardstick_of(bones, weights, None, 99, 64, 2)
    assert not seen.whole and said == "not compared with it: no rank reads more than its part"


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
        self.handed: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        made = super().__getitem__(name).clone()
        self.handed.append((name, weakref.ref(made)))
        self.most = max(self.most, len([item for item in self.alive() if self.held[item].dim() > 1]))
        return made

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
