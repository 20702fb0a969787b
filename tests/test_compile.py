"""The front door: options, expectations, dumps, reports, and errors that say what to do."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from transformers import LlamaForCausalLM

import fuseline
from fuseline import ir


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make("llama")


@pytest.fixture(scope="module")
def compiled(model: torch.nn.Module) -> fuseline.CompiledModel:
    return fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=fuseline.KVCacheConfig(max_tokens=256))


def test_expectations_are_met_or_explained(model: torch.nn.Module) -> None:
    fuseline.compile(model, device="cpu", max_seq_len=64, expect={"MergeQKV": 2, "FuseSiluMul": 2})
    with pytest.raises(fuseline.ExpectationError, match="was to fuse 4 sites and fused 0") as caught:
        fuseline.compile(model, device="cpu", max_seq_len=64, expect={"FuseAddRMSNorm": 4})
    assert "the addition is done by the kernel of the projection" in str(caught.value)
    with pytest.raises(fuseline.ExpectationError, match="no pass of that name"):
        fuseline.compile(model, device="cpu", max_seq_len=64, expect={"FuseEverything": 1})


def test_dump_directory_holds_every_stage(model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, dump=tmp_path)
    texts = sorted(path for path in tmp_path.glob("*.txt") if path.name[0].isdigit())
    assert texts[0].name == "000_capture.txt"
    assert texts[-1].read_text() == str(compiled.graph)
    for before, after in pairwise(texts):
        name = after.stem.partition("_")[2]
        assert str(fuseline.passes.run(ir.parse(before.read_text()), [name])) == after.read_text(), name
        assert after.with_suffix(".diff").exists()
    assert {path.stem for path in (tmp_path / "kernels").glob("*.py")} == {kernel.name for kernel in compiled.kernels}
    assert json.loads((tmp_path / "report.json").read_text())["captured"]["layers"] == 2
    assert (tmp_path / "mine.txt").read_text() == "kept"


class Scaled(LlamaForCausalLM):
    """A model with a weight that is called as an input of the paged graph is."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.slots = torch.nn.Parameter(torch.full((config.vocab_size,), 0.5))

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        out.logits = out.logits * self.slots
        return out


def test_a_weight_named_like_an_input_of_the_paged_graph_compiles(model: torch.nn.Module) -> None:
    scaled = Scaled(model.config).eval()
    compiled = fuseline.compile(scaled, device="cpu", max_seq_len=64)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = scaled(prompt).logits
    assert float((compiled(prompt).logits - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("stage", ["first", "last"])
def test_a_dump_is_enough_to_run(model: torch.nn.Module, tmp_path: Path, stage: str) -> None:
    whole = fuseline.compile(model, device="cpu", max_seq_len=64, dump=tmp_path)
    texts = sorted(path for path in tmp_path.glob("*.txt") if path.name[0].isdigit())
    graph = ir.parse(texts[0 if stage == "first" else -1].read_text())
    again = fuseline.compile(graph, weights=model, device="cpu", max_seq_len=64)
    given = [[3, 1, 4, 1, 5], [9, 2]]
    assert again.generate(given, max_new_tokens=8) == whole.generate(given, max_new_tokens=8)


def test_report_names_what_was_done(compiled: fuseline.CompiledModel) -> None:
    text = str(compiled.report)
    for word in ("LlamaForCausalLM", "MergeQKV", "gate_up", "KV cache", "self-check"):
        assert word in text
    facts = compiled.report.as_dict()
    assert facts["other_operators"] == {}
    assert facts["kernels"]["regions"]["gate_up"] == 2


def test_compile_is_deterministic(model: torch.nn.Module, compiled: fuseline.CompiledModel) -> None:
    again = fuseline.compile(model, device="cpu", max_seq_len=64)
    assert str(again.graph) == str(compiled.graph)
    assert [kernel.source for kernel in again.kernels] == [kernel.source for kernel in compiled.kernels]


def test_tensors_in_tensors_out(model: torch.nn.Module, compiled: fuseline.CompiledModel) -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = compiled.generate(ids, mask, max_new_tokens=6, stop_token_ids=[])
    lists = compiled.generate([[5, 6, 7], [1, 2, 3, 4, 5]], max_new_tokens=6, stop_token_ids=[])
    assert out.shape == (2, 11)
    assert torch.equal(out[:, :5], ids)
    assert out[:, 5:].tolist() == lists


def test_stop_tokens_end_an_answer_and_pad_the_tensor(compiled: fuseline.CompiledModel) -> None:
    given = [[5, 6, 7], [1, 2, 3]]
    free = compiled.generate(given, max_new_tokens=8, stop_token_ids=[])
    stop = free[0][2]
    ended = compiled.generate(given, max_new_tokens=8, stop_token_ids=[stop])
    assert ended[0] == free[0][: free[0].index(stop) + 1]
    out = compiled.generate(torch.tensor(given), max_new_tokens=8, stop_token_ids=[stop])
    assert out[0, 3 : 3 + len(ended[0])].tolist() == ended[0]
    assert set(out[0, 3 + len(ended[0]) :].tolist()) <= {compiled.pad_token_id}


def test_sampling_does_not_depend_on_the_batch(compiled: fuseline.CompiledModel) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 7, "stop_token_ids": []}
    together = compiled.generate([[5, 6, 7], [1, 2], [8]], **options)
    assert together == [compiled.generate([prompt], **options)[0] for prompt in ([5, 6, 7], [1, 2], [8])]
    assert compiled.generate([[8]], **{**options, "seed": 8}) != [together[2]]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, ["prompts[1]", "empty"]),
        ([[1], [10**6]], {}, ["prompts[1]", "vocabulary"]),
        ([[1], [True]], {}, ["prompts[1]"]),
        ([[1] * 70], {}, ["prompts[0]", "max_seq_len"]),
        ([[1]], {"temperature": -0.5}, ["temperature"]),
        ([[1]], {"top_p": 0.0}, ["top_p"]),
        ([[1]], {"max_new_tokens": 0}, ["max_new_tokens"]),
        ([1, 2, 3], {}, ["list of token lists"]),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.tensor([[0, 0]])}, ["prompts[0]", "empty"]),
        (torch.tensor([[1, 2, 3]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, ["prompts[0]", "hole"]),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    compiled: fuseline.CompiledModel, prompts: object, options: dict[str, object], words: list[str]
) -> None:
    before = compiled.stats
    with pytest.raises(fuseline.InvalidRequestError) as caught:
        compiled.generate(prompts, **options)
    for word in words:
        assert word in str(caught.value)
    assert compiled.stats == before
    assert not compiled.engine.has_work
    compiled.engine.check_integrity()


def test_a_pool_too_small_for_a_request(model: torch.nn.Module) -> None:
    small = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=fuseline.KVCacheConfig(max_tokens=32))
    with pytest.raises(fuseline.InvalidRequestError, match=r"prompts\[1\]"):
        small.generate([[1, 2], [1] * 30], max_new_tokens=20)
    assert len(small.generate([[1, 2]], max_new_tokens=20, stop_token_ids=[])[0]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "no scheme"),
        ({"tensor_parallel": 0}, "tensor_parallel must be a whole number of at least 1"),
        ({"schedule": "persistent"}, "not available yet"),
        ({"dtype": "int8"}, "not supported"),
        ({"device": "meta"}, "not supported"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_seq_len": 10**6}, "max_position_embeddings"),
        ({"kv_cache": fuseline.KVCacheConfig(block_size=7)}, "block_size"),
        ({"kv_cache": fuseline.KVCacheConfig(max_tokens=0)}, "max_tokens"),
    ],
)
def test_options_that_make_no_sense(model: torch.nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(fuseline.OptionError, match=message):
        fuseline.compile(model, **{"device": "cpu", **options})


@pytest.mark.parametrize("block_size", [8, 64])
def test_block_size_does_not_change_the_tokens(compiled: fuseline.CompiledModel, block_size: int) -> None:
    cache = fuseline.KVCacheConfig(block_size=block_size, max_tokens=512)
    other = fuseline.compile(make("llama"), device="cpu", max_seq_len=64, kv_cache=cache)
    given = [[5, 6, 7] * 6, [1, 2]]
    assert other.generate(given, max_new_tokens=20) == compiled.generate(given, max_new_tokens=20)


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fuseline.UnsupportedModelError, match="not a causal language model"):
        fuseline.compile(tmp_path / "nothing", device="cpu")
    with pytest.raises(fuseline.UnsupportedModelError, match="cannot compile a int"):
        fuseline.compile(3, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(fuseline.OptionError, match="weights="):
        fuseline.compile(ir.parse("def f(x: f32[2]):\n    return x\n"), device="cpu")


def test_a_saved_checkpoint_compiles_like_the_model(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    from_path = fuseline.compile(tmp_path, device="cpu", max_seq_len=64)
    live = fuseline.compile(model, device="cpu", max_seq_len=64)
    given = [[5, 6, 7], [1, 2, 3, 4]]
    assert from_path.generate(given, max_new_tokens=8) == live.generate(given, max_new_tokens=8)


def test_saving_is_refused_with_a_typed_error(compiled: fuseline.CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(fuseline.OptionError, match="not available yet"):
        compiled.save(tmp_path)
    with pytest.raises(fuseline.OptionError, match="not available yet"):
        fuseline.load(tmp_path)
