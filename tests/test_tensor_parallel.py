"""Tensor parallelism with simulated ranks: tokens of the whole model, and a stated reason for what is not divided."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REQUIRED, config, make, randomize
from quantized_models import wide
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fuseline
from fuseline import ir, passes
from fuseline.ir.dist import shard_columns
from fuseline.ir.quantized import dequantize, quantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.runtime.groups import simulated
from fuseline.runtime.parts import check_alike
from fuseline.runtime.simulated import SimulatedRanks

_DIVISIBLE: Mapping[str, int] = {
    **dict.fromkeys(("num_attention_heads", "n_head"), 8),
    **dict.fromkeys(("moe_intermediate_size", "hidden_size", "n_embd", "word_embed_proj_dim"), 64),
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@cache
def divisible(name: str, **more: Any) -> PreTrainedModel:
    """A tiny model of a family with 8 heads (2 of keys and values, if they may differ), 64 features and 96 tokens."""
    family = FAMILIES[name]
    plain = config(family)
    changes = {key: value for key, value in _DIVISIBLE.items() if getattr(plain, key, None) is not None}
    if getattr(plain, "num_key_value_heads", None) is None:
        changes.pop("num_key_value_heads", None)
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(
        config(replace(family, changes={**family.changes, **changes, **more})), attn_implementation="eager"
    )
    randomize(made, 0)
    return made.eval()


_OPTIONS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "max_batch_size": 3}
_PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(20, 40))]


def tokens(model: Any, **options: Any) -> tuple[fuseline.CompiledModel, list[list[int]]]:
    compiled = fuseline.compile(model, **{**_OPTIONS, **options})
    return compiled, compiled.generate(_PROMPTS, max_new_tokens=6, stop_token_ids=[])


def cut_and_kept(compiled: fuseline.CompiledModel) -> tuple[list[str], dict[str, str]]:
    """The projections and the table that are cut, and what is not with the reason."""
    report = next(item for item in compiled.report.passes if item.name == "Shard")
    return report.fused, {item.site: item.why for item in report.refused}


@pytest.mark.parametrize("name", [*REQUIRED, "cohere", "glm4"])
def test_ranks_generate_the_tokens_of_the_whole_model(name: str) -> None:
    """A cut in the wrong place, a bias added twice or heads with the keys of others would change tokens."""
    model = divisible(name)
    _, expected = tokens(model)
    for ranks in (2, 4):
        compiled, found = tokens(model, tensor_parallel=ranks, simulate=True)
        assert found == expected
        cut, kept = cut_and_kept(compiled)
        assert "lm_head" in cut
        layers = compiled.report.layers
        assert len(cut) == 4 * layers + 2, "attention and MLP of every layer are divided, and both ends"
        assert all("router" in site or "gate" in site for site in kept), kept


def test_every_rank_has_the_same_bits_and_its_part_of_weights_and_cache() -> None:
    model = divisible("llama", num_hidden_layers=5)
    whole, _ = tokens(model)
    compiled, _ = tokens(model, tensor_parallel=4, simulate=True, skip=["LogitsInParts"])
    caches = {str(node.meta["type"]) for node in compiled.graph.calls() if str(node.target) == "cache"}
    assert caches == {"f32[C, 1, 16]"}, "two heads of keys are shared by two ranks each"
    assert compiled.report.cache_bytes * 2 == whole.report.cache_bytes
    ranks = compiled.engine._runner.model
    assert isinstance(ranks, SimulatedRanks)
    seen: list[list[torch.Tensor]] = []
    plain = ranks.all
    ranks.all = lambda step, out=None: seen.append(plain(step, out)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    compiled.generate(_PROMPTS, max_new_tokens=3)
    assert len(seen) >= 3
    assert all(torch.equal(logits, step[0]) for step in seen for logits in step)


def test_what_cannot_be_divided_is_whole_for_a_reason() -> None:
    """6 heads among 4 ranks: attention is computed by each, MLP and output are divided."""
    model = make("llama")
    _, expected = tokens(model)
    compiled, found = tokens(model, tensor_parallel=4, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert cut == ["embed_tokens", "l0_gate_up", "l0_down_proj", "l1_gate_up", "l1_down_proj", "lm_head"]
    assert kept["l0_qkv"] == "every rank computes it whole: 6 cannot be divided among 4 ranks"


@pytest.mark.parametrize(
    ("name", "ranks", "more", "quantization", "rows"),
    [
        ("llama", 3, {"num_attention_heads": 6, "hidden_size": 48, "intermediate_size": 48}, None, 48),
        ("gemma2", 2, {}, None, 64),
        ("llama", 2, {}, {"lm_head": "int8"}, 64),
    ],
)
def test_vocabularies_are_padded(
    name: str, ranks: int, more: dict[str, int], quantization: dict[str, str | None] | None, rows: int
) -> None:
    """97 tokens: each rank makes the logits of a part of more rows, and none of those that were added is ever seen."""
    model = divisible(name, vocab_size=97, **more)
    whole, expected = tokens(model, quantization=quantization)
    compiled, found = tokens(model, quantization=quantization, tensor_parallel=ranks, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert "lm_head" in cut and "l0_down_proj" in cut and not kept
    report = next(item for item in compiled.report.passes if item.name == "Shard")
    said = f"lm_head: padded to {rows * ranks} outputs, since 97 cannot be divided among {ranks} ranks"
    table = f"embed_tokens: padded to {-(-97 // ranks) * ranks} rows, since 97 cannot be divided among {ranks} ranks"
    assert [str(item) for item in report.near] == [table, said]
    part = next(node for node in compiled.graph.calls() if node.name == "lm_head")
    assert str(part.meta["type"]) == f"f32[R, {rows}]"
    prompt = [[3, 5, 96]]
    torch.testing.assert_close(compiled(prompt).logits, whole(prompt).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "ranks", "more", "site", "why"),
    [
        (
            "llama",
            3,
            {"hidden_size": 48, "num_attention_heads": 6},
            "l0_gate_up",
            "64 outputs cannot be divided among 3 ranks",
        ),
        ("deepseek_v3", 2, {"num_key_value_heads": 8}, "l0_q_a_proj", "l0_mul_3 (nn.rms_norm) reads whole rows"),
    ],
)
def test_awkward_models_keep_their_tokens(name: str, ranks: int, more: dict[str, int], site: str, why: str) -> None:
    model = divisible(name, **more)
    _, expected = tokens(model)
    compiled, found = tokens(model, tensor_parallel=ranks, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert cut and kept[site] == f"every rank computes it whole: {why}"


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_heads_of_values_that_are_narrower_than_those_of_keys_are_repeated(quantization: str | None) -> None:
    model = make("mimo_v2_flash")
    _, expected = tokens(model, quantization=quantization)
    compiled, found = tokens(model, quantization=quantization, tensor_parallel=2, simulate=True)
    assert found == expected
    widths = {
        line.rpartition(", ")[2][:2]
        for line in str(compiled.graph).splitlines()
        if "l1_qkv" in line and "nn.repeat_rows(" in line
    }
    assert widths == {"12", "16"}


@pytest.mark.parametrize(
    ("name", "scheme", "operator"),
    [
        ("llama", "int8", 'dist.shard_columns(l0_mlp_down_proj_weight_int8, "int8", [160], 2)'),
        ("mixtral", "int8", "dist.shard_columns"),
        ("gpt2", "int4g32", 'transpose_3_int4g32_part: int4g32[96, 192] = nn.quantize(transpose_3_part, "int4g32")'),
    ],
)
def test_rounded_weights_are_cut_with_their_factors(name: str, scheme: str, operator: str) -> None:
    model = wide(name)
    _, expected = tokens(model, quantization=scheme)
    compiled, found = tokens(model, quantization=scheme, tensor_parallel=2, simulate=True)
    assert found == expected
    assert operator in str(compiled.graph)


@pytest.mark.parametrize("scheme", ["int8", "int8g32", "int4g32", "uint4g32", "int8d", "fp8"])
def test_parts_of_rounded_rows_are_parts_of_their_numbers(scheme: str) -> None:
    """Codes lie in blocks that do not end where parts do: a cut of bytes would mix them up."""
    sections, found = [192, 64], scheme_of(scheme)
    assert found is not None
    matrix = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    rows = quantize(matrix, found)
    whole = dequantize(rows, TensorType(scheme, (5, 256)), torch.float32)
    for group in simulated(2):
        part = shard_columns(rows, scheme, sections, 2, group=group)
        numbers = dequantize(part, TensorType(scheme, (5, 128)), torch.float32)
        first, second = whole.split(sections, 1)
        expected = torch.cat((first.chunk(2, 1)[group.rank], second.chunk(2, 1)[group.rank]), 1)
        assert torch.equal(numbers, expected)


def test_groups_of_128_are_divided() -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)).eval()
    _, expected = tokens(model, quantization="int4g128")
    compiled, found = tokens(model, quantization="int4g128", tensor_parallel=4, simulate=True)
    assert found == expected and len(cut_and_kept(compiled)[0]) == 10


def test_groups_that_would_be_torn_are_put_together_first() -> None:
    """80 of 160 inputs of a product are no whole groups: its rows are gathered, and its outputs are cut and gathered."""
    model = wide("llama")
    _, expected = tokens(model, quantization="int4g32")
    compiled, found = tokens(model, quantization="int4g32", tensor_parallel=2, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert {"l0_qkv", "l0_o_proj", "l0_down_proj", "l1_down_proj"} <= set(cut) and not kept
    report = next(item for item in compiled.report.passes if item.name == "Shard")
    (why,) = [item.why for item in report.near if item.site == "l0_down_proj"]
    assert why == (
        "its outputs are cut, and its inputs gathered: l0_down_proj: 80 of 160 inputs are no whole groups of int4g32"
    )
    gathered = [
        line.strip() for line in str(compiled.graph).splitlines() if line.lstrip().startswith("l0") and "all_g" in line
    ]
    assert len(gathered) == 4, "the inputs and outputs of two projections"


def test_patterns_keep_weights_whole() -> None:
    model = divisible("llama")
    compiled, _ = tokens(model, tensor_parallel=2, simulate=True, replicated=["lm_head", "*.gate_proj"])
    cut, kept = cut_and_kept(compiled)
    assert {"l0_qkv", "l0_o_proj"} <= set(cut) and not {"lm_head", "l0_gate_up", "l0_down_proj"} & set(cut)
    assert kept["lm_head"].endswith("'lm_head' is not to be cut")
    _, expected = tokens(model)
    compiled, found = tokens(model, tensor_parallel=2, simulate=True, replicated=["*.down_proj"])
    cut, kept = cut_and_kept(compiled)
    assert found == expected and {"l0_o_proj", "l0_gate_up"} <= set(cut) and "l0_down_proj" not in cut
    assert kept["l0_down_proj"] == "every rank computes it whole: '*.down_proj' is not to be cut"
    with pytest.raises(fuseline.UnsupportedModelError, match="'nothing' fits the name of no projection's weight"):
        tokens(model, tensor_parallel=2, simulate=True, replicated=["nothing"])


def plan_line(compiled: fuseline.CompiledModel) -> str:
    return dict(compiled.report.rows())["ranks"]


def test_the_plan_of_the_model_is_compared() -> None:
    same = "agrees with base_model_tp_plan in {} of {} kinds of projections"
    compiled, _ = tokens(divisible("mixtral"), tensor_parallel=2, simulate=True)
    assert plan_line(compiled) == same.format(7, 7)
    compiled, _ = tokens(divisible("llama"), tensor_parallel=2, simulate=True, replicated=["*.v_proj"])
    first, *others = plan_line(compiled).split("; ")
    assert first == same.format(4, 8) and len(others) == 4
    why = "model.layers.*.self_attn.k_proj is colwise there, and whole here ('*.v_proj' is not to be cut)"
    assert why in others
    compiled, _ = tokens(divisible("gpt2"), tensor_parallel=2, simulate=True)
    assert "ranks" not in dict(compiled.report.rows()), "a model may state no plan"


def test_the_plan_of_the_model_is_followed_where_there_is_a_choice() -> None:
    """olmo2 has norms over whole rows of queries and keys: its plan gathers what the ranks have of them."""
    model = divisible("olmo2")
    _, expected = tokens(model)
    compiled, found = tokens(model, tensor_parallel=2, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert {"l0_qkv", "l0_o_proj", "l1_down_proj"} <= set(cut) and not kept
    assert "l0_q_proj_gathered: f32[T, 64] = dist.all_gather(l0_q_proj, 1, 2)" in str(compiled.graph)
    assert "8 of 8" in plan_line(compiled)
    model = divisible.__wrapped__("llama")  # one of its own, since its plan is changed
    model._tp_plan = {**model.tp_plan, "model.layers.*.mlp.down_proj": "replicate"}
    _, expected = tokens(model)
    compiled, found = tokens(model, tensor_parallel=2, simulate=True)
    assert found == expected
    cut, kept = cut_and_kept(compiled)
    assert "l0_gate_up" in cut
    assert kept["l0_down_proj"] == "every rank computes it whole: the model's own plan keeps it whole"
    assert "8 of 8" in plan_line(compiled), "it keeps that one whole, too"


def test_a_rank_that_fails_is_named_and_the_others_go_on() -> None:
    compiled, expected = tokens(divisible("llama"), tensor_parallel=2, simulate=True)
    ranks: Any = compiled.engine._runner.model
    whole = ranks._executors[1]

    def fails(step: object, out: object = None) -> None:
        raise ValueError("out of luck")

    ranks._executors[1] = fails
    with pytest.raises(ValueError, match="out of luck") as raised:
        compiled.generate(_PROMPTS, max_new_tokens=6)
    assert "on rank 1 of 2" in raised.value.__notes__
    ranks._executors[1] = whole
    assert compiled.generate(_PROMPTS, max_new_tokens=6, stop_token_ids=[]) == expected


def test_dumps_replay_and_verify_finds_wrong_placements(tmp_path: Path) -> None:
    fuseline.compile(divisible("llama"), tensor_parallel=2, simulate=True, dump=tmp_path, **_OPTIONS)
    files = sorted(tmp_path.glob("[0-9]*.txt"))
    for before, after in pairwise(files):
        name = after.stem.partition("_")[2]
        if files.index(after) > passes.PASSES.pipeline.index("Quantize"):
            assert ir.dump(passes.run(ir.parse(before.read_text()), [name])) == after.read_text(), name
    text = next(tmp_path.glob("*_Shard.txt")).read_text()
    assert "l0_o_proj: f32[T, 64] @ partial = aten.linear(l0_reshape, l0_self_attn_o_proj_weight_part)" in text
    assert (
        "l0_self_attn_q_proj_weight_part: f32[128, 64] @ shard(0) = dist.shard(l0_self_attn_q_proj_weight, 0, [128])"
        in (text)
    ), "a rank reads its part of a weight alone"
    ir.verify(ir.parse(text))
    again = passes.run(ir.parse(text), ["Shard"])
    assert ir.dump(again) == text, "a graph that is cut is not cut again"
    wrong = text.replace("l0_view: f32[T, 8, 16] @ shard(1)", "l0_view: f32[T, 8, 16] @ shard(2)")
    with pytest.raises(
        fuseline.VerificationError, match=r"stated placement .*shard\(2\).*computed placement shard\(1\)"
    ):
        ir.verify(ir.parse(wrong))
    wrong = text.replace("(embed_tokens_reduced, l0_o_proj_reduced)", "(embed_tokens_reduced, l0_o_proj)")
    with pytest.raises(fuseline.VerificationError, match="l0_o_proj must be whole there: .* parts of a sum"):
        ir.verify(ir.parse(wrong))
    local = ir.parse(next(tmp_path.glob("*_Localize.txt")).read_text())
    ranks = fuseline.compile(local, weights=divisible("llama"), tensor_parallel=2, simulate=True, **_OPTIONS)
    _, expected = tokens(divisible("llama"))
    assert ranks.generate(_PROMPTS, max_new_tokens=6, stop_token_ids=[]) == expected


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_every_dump_of_a_rounded_model_on_ranks_can_be_run(scheme: str, tmp_path: Path) -> None:
    """What is rounded and cut already stays so when a graph goes through the passes again."""
    many: dict[str, Any] = {"tensor_parallel": 3, "simulate": True, **_OPTIONS}
    compiled = fuseline.compile(wide("llama"), quantization=scheme, dump=tmp_path, **many)
    expected = compiled.generate(_PROMPTS, max_new_tokens=4)
    texts = sorted(tmp_path.glob("[0-9][0-9][0-9]_*.txt"))
    assert {"Quantize", "Shard", "Localize", "PageAttention", "GroupKernels"} <= {path.stem[4:] for path in texts}
    for path in texts[next(place for place, path in enumerate(texts) if "Quantize" in path.name) :]:
        again = fuseline.compile(ir.parse(path.read_text()), weights=wide("llama"), **many)
        assert again.generate(_PROMPTS, max_new_tokens=4) == expected, path.name


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tensor_parallel": 0, "simulate": True}, "tensor_parallel must be a whole number of at least 1"),
        ({"tensor_parallel": 2, "simulate": True, "replicated": "a,b"}, "'a,b' is no pattern of weight names"),
        ({"simulate": True}, "simulate=True is for several ranks"),
        ({"replicated": "lm_head"}, "replicated=.* is for several ranks"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(fuseline.OptionError, match=why):
        fuseline.compile("nowhere", device="cpu", **options)


def test_a_graph_of_other_ranks_is_refused() -> None:
    text = "def f(x: f32[T, 4], *, T: dim(1, 8), tensor_parallel: option(4)):\n    return x\n"
    with pytest.raises(fuseline.OptionError, match="the graph is for 4 ranks: pass tensor_parallel=4"):
        fuseline.compile(ir.parse(text), weights="nowhere", device="cpu", tensor_parallel=2, simulate=True)


def test_ranks_that_compiled_different_graphs_do_not_start() -> None:
    graphs = [
        fuseline.compile(divisible("llama"), tensor_parallel=2, simulate=True, replicated=kept, **_OPTIONS).graph
        for kept in ([], ["*.down_proj"])
    ]

    def check(pairs: list[fuseline.ir.Graph]) -> list[BaseException | None]:
        with ThreadPoolExecutor(2) as threads:
            jobs = [threads.submit(check_alike, group, graph) for group, graph in zip(simulated(2), pairs)]
            return [job.exception() for job in jobs]

    assert check([graphs[0], graphs[0]]) == [None, None]
    for error in check(graphs):
        assert isinstance(error, fuseline.RankError) and "another graph" in str(error)
