"""A rank reads its part of a checkpoint's files: the values are those that transformers loads, and nothing else is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from deep import make_deep
from families import make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tensor_parallel import divisible, tokens
from transformers import AutoModelForCausalLM

from fuseline.ir.checkpoints import files
from fuseline.ir.checkpoints.plain import FileWeights
from fuseline.ir.fold import Fold
from fuseline.ir.skeleton import skeleton
from fuseline.runtime import yardstick
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


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "opt", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "jamba"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_that_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Converted, tied, stacked and kept wide as there, whatever the checkpoint's type and number of files."""
    make(name, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    bones = skeleton(tmp_path, dtype)
    found, expected = bones.lazy(), bones.load()
    assert isinstance(found, FileWeights) and set(found) == set(expected)
    for item, value in expected.items():
        known = found.like(item)
        assert known is not None and known.dtype == value.dtype and known.shape == value.shape
        assert found[item].dtype == value.dtype and torch.equal(found[item], value), item


def test_a_buffer_that_files_hold_is_left_to_transformers(tmp_path: Path) -> None:
    """Its type on loading is a matter of its own."""
    make("zaya").save_pretrained(tmp_path)
    assert skeleton(tmp_path, torch.float32).lazy() is None


def test_what_is_computed_on_loading_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are turned, and not only stacked."""
    make("mixtral").save_pretrained(tmp_path)
    assert skeleton(tmp_path, torch.float32).lazy() is not None
    monkeypatch.setattr(
        "transformers.core_model_loading.MergeModulelist.convert",
        lambda self, values, **_: {name: torch.stack([item.t() for item in items]) for name, items in values.items()},
    )
    assert skeleton(tmp_path, torch.float32).lazy() is None


def test_experts_that_the_files_lack_are_left_to_transformers(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    del values[max(name for name in values if ".experts." in name)]
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
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


@pytest.mark.parametrize("by_expert", [(), ("*.experts.*",)])
@pytest.mark.parametrize(
    ("name", "more", "ranks"),
    [
        ("gpt_oss", {}, 2),
        ("mixtral", {}, 4),
        ("qwen3_moe", {"num_local_experts": 6}, 4),
    ],
)
def test_a_rank_reads_its_part_of_experts(
    name: str, more: dict[str, int], ranks: int, by_expert: tuple[str, ...], read: Counter[str], tmp_path: Path
) -> None:
    """Some of them or a part of each, held stacked or one by one; of the router, everything. Padding reads the last again."""
    divisible(name, **more).save_pretrained(tmp_path)
    bones = skeleton(tmp_path, torch.float32)
    options = Options(CPU, torch.float32, 3, 64, 64, KVCacheConfig(), tensor_parallel=ranks, expert_parallel=by_expert)
    loop = lower(bones, options, Wishes(), Report("cpu", "float32")).loop
    found, whole = bones.lazy(), bones.load()
    assert found is not None
    count, routers = more.get("num_local_experts", 4), (".gate.weight", ".router.weight")

    def of_experts(sizes: Mapping[str, int]) -> int:
        return sum(size for item, size in sizes.items() if ".experts." in item and not item.endswith("bias"))

    sizes = {item: value.nbytes for item, value in whole.items()}
    for group in simulated(ranks):
        read.clear()
        ((part,), _) = place_parts(loop, loop, found, CPU, {}, [group], iter)
        ((expected,), _) = place_parts(loop, loop, whole, CPU, {}, [group], iter)
        share = -(-count // ranks)
        here = min(share, count - min(share * group.rank, count - 1))
        assert of_experts(read) == of_experts(sizes) * (here / count if by_expert else 1 / ranks)
        whole_read, held = (sum(of[item] for item in of if item.endswith(routers)) for of in (read, sizes))
        assert whole_read == held > 0
        for node, values in expected.constants.items():
            assert all(map(torch.equal, part.constants[node], values)), node


@pytest.mark.parametrize("layers", [2, 6])
def test_ranks_that_read_parts_generate_the_tokens_of_one(layers: int, tmp_path: Path) -> None:
    deepcopy(divisible("llama", num_hidden_layers=layers)).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="60KB"
    )
    _, expected = tokens(tmp_path)
    for ranks in (2, 4):
        compiled, found = tokens(tmp_path, tensor_parallel=ranks, simulate=True)
        assert found == expected and not compiled.report.source_check
    _, expected = tokens(tmp_path, quantization="int8")
    _, found = tokens(tmp_path, quantization="int8", tensor_parallel=2, simulate=True)
    assert found == expected


def test_ranks_that_read_parts_of_experts_generate_the_tokens_of_one(tmp_path: Path) -> None:
    """Stacked from a file's tensors: a part of each, or some of them, of which 3 ranks have 2, 2 and none."""
    deepcopy(divisible("mixtral")).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    _, expected = tokens(tmp_path, quantization="int8")
    for ranks, by_expert in [(2, []), (3, ["*.experts.*"])]:
        wanted = {"tensor_parallel": ranks, "simulate": True, "expert_parallel": by_expert}
        assert tokens(tmp_path, quantization="int8", **wanted)[1] == expected


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
