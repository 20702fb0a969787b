"""Experts divided among ranks: the tokens of the whole model, who has which expert, and when it is done without being asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from quantized_models import wide
from tensor_parallel import mpirun, needs_mpirun, on_ranks, traced_once
from test_tensor_parallel import _OPTIONS, cut_and_kept, divisible, plan_line, tokens
from torch.fx import Node

import fuseline
from fuseline import ir, passes
from fuseline.ir import dist
from fuseline.ir.dist import MEETINGS, Mirror
from fuseline.ir.graph import type_of
from fuseline.ir.interpret import interpret
from fuseline.ir.ops import op_name
from fuseline.ir.weights import cut
from fuseline.runtime import cli
from fuseline.runtime.bench.floor import decode_bytes, prefill_operations
from fuseline.runtime.groups import simulated

_EXPERTS = {"expert_parallel": ["*.experts.*"], "simulate": True}
_LAYER = """\
def f(x: f32[T, 4], scores: f32[T, 6], shares: f32[T, 2, 1], *, T: dim(1, 64), OPTIONS):
    top: (f32[T, 2], i64[T, 2]) = aten.topk(scores, 2)
    ids: i64[T, 2] = top[1]
    first: f32[6, 8, 4] = weight("mlp.experts.up_proj")
    first_bias: f32[6, 8] = weight("mlp.experts.up_proj_bias")
    up: f32[T, 2, 8] = nn.grouped_linear(x, ids, first, first_bias)
    high: f32[T, 2, 8] = aten.sigmoid(up)
    second: f32[6, 4, 8] = weight("mlp.experts.down_proj")
    second_bias: f32[6, 4] = weight("mlp.experts.down_proj_bias")
    down: f32[T, 2, 4] = nn.grouped_linear(high, ids, second, second_bias)
    shared: f32[T, 2, 4] = aten.mul.Tensor(down, shares)
    total: f32[T, 4] = aten.sum.dim_IntList(shared, [1])
    return total
"""


@pytest.fixture(scope="module", autouse=True)
def models_are_traced_once() -> Iterator[None]:
    with traced_once():
        yield


def near(compiled: fuseline.CompiledModel) -> list[str]:
    """What the report says of projections that are cut otherwise than they might be."""
    return [str(item) for item in next(item for item in compiled.report.passes if item.name == "Shard").near]


def grouped(compiled: fuseline.CompiledModel) -> list[Node]:
    return [node for node in compiled.graph.calls() if op_name(node.target) == "nn.grouped_linear"]


def experts(compiled: fuseline.CompiledModel) -> set[int]:
    """How many experts a rank computes, of those that rows are sent to."""
    assert all(op_name(node.args[1].target) == "dist.route" for node in grouped(compiled))  # type: ignore[union-attr]
    return {type_of(node.args[2]).shape[0] for node in grouped(compiled)}  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("deepseek_v3-groups", {"num_key_value_heads": 8}),
    ],
)
def test_ranks_with_experts_of_their_own_generate_the_tokens_of_the_whole_model(
    name: str, more: dict[str, int]
) -> None:
    """A token sent to another expert, a bias added by all, or shared experts added twice would change tokens."""
    model = divisible(name, **more)
    _, expected = tokens(model)
    for ranks in (2, 4):
        compiled, found = tokens(model, tensor_parallel=ranks, **_EXPERTS)
        assert found == expected
        assert experts(compiled) == {4 // ranks}
        cut, kept = cut_and_kept(compiled)
        assert {"l1_experts", "l1_experts_1", "lm_head"} <= set(cut)
        assert all("router" in site or "gate" in site or "_a_" in site for site in kept), kept
    meetings = sum(op_name(node.target) in MEETINGS for node in compiled.graph.calls())
    assert meetings == 2 * compiled.report.layers, "ranks meet as often as where each expert is cut"
    if "ranks" in dict(compiled.report.rows()):
        assert plan_line(compiled).endswith("with base_model_ep_plan in 2 of 2 kinds of projections")


@pytest.mark.parametrize(("name", "more", "ranks"), [("gpt_oss", {}, 2), ("qwen3_moe", {"num_local_experts": 6}, 4)])
def test_rounded_experts_are_divided_with_their_factors(name: str, more: dict[str, int], ranks: int) -> None:
    """Of one token, a step sends rows to two experts: most ranks have nothing to do."""
    model = divisible(name, **more) if more else wide(name)
    schemes = {"*.experts.gate_up_proj": "int8", "*.experts.down_proj": "int4g32"}
    whole, expected = tokens(model, quantization=schemes)
    compiled, found = tokens(model, quantization=schemes, tensor_parallel=ranks, verify=True, **_EXPERTS)
    assert found == expected
    alone = [item.generate([[7]], max_new_tokens=6, stop_token_ids=[]) for item in (whole, compiled)]
    assert alone[0] == alone[1]
    kinds = [type_of(node.args[2]) for node in grouped(compiled)]  # type: ignore[arg-type]
    assert {(kind.dtype, kind.shape[0]) for kind in kinds} == {("int8", 2), ("int4g32", 2)}


def test_experts_whose_groups_would_be_torn_are_divided() -> None:
    """80 of 160 features are no whole groups of codes; whole rows of experts would have to be gathered."""
    model = wide("mixtral")
    _, expected = tokens(model, quantization="int4g32")
    compiled, found = tokens(model, quantization="int4g32", tensor_parallel=2, simulate=True)
    assert found == expected
    why = "l0_experts_1: 80 of 160 inputs are no whole groups of int4g32"
    assert f"l0_experts: its experts are cut: {why}" in near(compiled)
    assert experts(compiled) == {2}
    assert "all_gather(l0_experts" not in str(compiled.graph)


@pytest.mark.parametrize(
    ("ranks", "asked", "here", "said"),
    [
        (2, True, 3, []),
        (3, False, 2, ["its experts are cut: 64 outputs cannot be divided among 3 ranks"]),
        (4, False, 6, []),
        (4, True, 2, ["padded to 8 experts, since 6 cannot be divided among 4 ranks"]),
        (
            5,
            False,
            2,
            [
                "its experts are cut: 64 outputs cannot be divided among 5 ranks",
                "padded to 10 experts, since 6 cannot be divided among 5 ranks",
            ],
        ),
        (8, True, 1, ["padded to 8 experts, since 6 cannot be divided among 8 ranks"]),
    ],
)
def test_ranks_divide_experts_or_each_of_them(ranks: int, asked: bool, here: int, said: list[str]) -> None:
    """6 experts with 64 features: the report says what stands in the way. Ranks may have fewer experts, or none."""
    model = divisible("qwen3_moe", num_local_experts=6)
    _, expected = tokens(model)
    wanted = _EXPERTS if asked else {"simulate": True}
    compiled, found = tokens(model, tensor_parallel=ranks, **wanted)
    assert found == expected
    assert {"l0_experts", "l0_experts_1"} <= set(cut_and_kept(compiled)[0])
    assert [item.partition(": ")[2] for item in near(compiled) if item.startswith("l0_experts:")] == said
    shapes = [type_of(node.args[2]).shape for node in grouped(compiled)]  # type: ignore[arg-type]
    assert {shape[0] for shape in shapes} == {here}
    plan = "base_model_tp_plan in 7 of 7" if here == 6 else "base_model_ep_plan in 2 of 2"
    assert f"with {plan} kinds of projections" in plan_line(compiled)


def test_experts_that_ranks_can_divide_in_no_way_are_whole() -> None:
    """Between the projections stands what needs whole rows of all tokens."""
    options = 'tensor_parallel: option(3), expert_parallel: option("mlp.experts.*")'
    text = _LAYER.replace("OPTIONS", options).replace("aten.sigmoid(up)", "aten.cumsum(up, 0)")
    (step,) = passes.steps(ir.parse(text), ["Shard"], check=True)
    (why, _) = [item.why for item in step.report.refused]
    assert why == (
        "every rank computes it whole: high (aten.cumsum) is not known to work on the rows of some experts; "
        "8 outputs cannot be divided among 3 ranks"
    )


def test_patterns_say_which_experts_are_divided() -> None:
    model = divisible("mixtral")
    _, expected = tokens(model)
    by_expert = ["model.layers.1.*.down_proj"]
    compiled, found = tokens(model, tensor_parallel=2, simulate=True, expert_parallel=by_expert)
    assert found == expected
    shapes = {node.name: type_of(node.args[2]).shape for node in grouped(compiled)}  # type: ignore[arg-type]
    assert shapes["l1_experts"] == (2, 128, 64), "both of a layer go the same way"
    assert shapes["l1_experts_1"] == (2, 64, 64)
    assert shapes["l0_experts"] == (4, 64, 64)
    compiled, found = tokens(model, tensor_parallel=2, replicated=["*.experts.*"], **_EXPERTS)
    assert found == expected and "l0_experts" in cut_and_kept(compiled)[1]
    with pytest.raises(fuseline.UnsupportedModelError, match="'lm_head' fits the name of no weight of experts"):
        tokens(model, tensor_parallel=2, simulate=True, expert_parallel=["lm_head"])
    with pytest.raises(fuseline.OptionError, match="expert_parallel=.* is for several ranks"):
        fuseline.compile("nowhere", device="cpu", expert_parallel=["*.experts.*"])
    with pytest.raises(fuseline.OptionError, match="expert_parallel: 'a,b' is no pattern of weight names"):
        fuseline.compile("nowhere", device="cpu", tensor_parallel=2, simulate=True, expert_parallel=["a,b"])


def test_ranks_sum_up_what_their_experts_make() -> None:
    """Between the projections, what a rank has for the experts of others is not zero: nothing of it may count."""
    options = 'tensor_parallel: option(3), expert_parallel: option("mlp.experts.*")'
    graph = ir.parse(_LAYER.replace("OPTIONS", options))
    (step,) = passes.steps(graph, ["Shard"], check=True)
    text = ir.dump(step.graph)
    assert "ids_routed: i64[T, 2] @ routed = dist.route(ids, 6)" in text
    assert "high: f32[T, 2, 8] @ routed = aten.sigmoid(up)" in text
    assert "down: f32[T, 2, 4] @ partial = nn.grouped_linear(high, ids_routed, second_part, second_bias_part)" in text
    local = passes.run(ir.parse(text), ["Localize"])
    assert decode_bytes(local, 5, 1) * 3 == pytest.approx(decode_bytes(graph, 5, 1)), "a rank reads its experts"
    assert prefill_operations(local, 2, 9) * 3 == prefill_operations(graph, 2, 9)
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(9, 4, generator=draw),
        "scores": torch.randn(9, 6, generator=draw),
        "shares": torch.rand(9, 2, 1, generator=draw),
    }
    weights = {str(node.args[0]): node for node in graph.calls() if str(node.target) == "weight"}
    drawn = {name: torch.randn(type_of(node).concrete({}), generator=draw) for name, node in weights.items()}
    (expected,) = interpret(graph, inputs, drawn)
    for (found,) in [interpret(step.graph, inputs, drawn), *on_ranks(local, 3, inputs, drawn)]:
        torch.testing.assert_close(found, expected)
    (mirrored,) = interpret(local, inputs, drawn, group=Mirror(3))
    first = {**inputs, "shares": inputs["shares"] * (inputs["scores"].topk(2)[1] < 2).unsqueeze(-1)}
    torch.testing.assert_close(mirrored, 3 * interpret(graph, first, drawn)[0])


def test_padding_is_the_last_expert_again() -> None:
    """Before the parts are made, in parts, and where a caller's tensor is cut."""
    experts = torch.arange(18.0).reshape(6, 3)
    padded = experts[[0, 1, 2, 3, 4, 5, 5, 5]]
    assert torch.equal(dist.shard(experts, 0, [8]), padded)
    for group in simulated(4):
        part = padded.chunk(4)[group.rank]
        assert torch.equal(dist.shard(experts, 0, [8], 4, group=group), part)
        assert torch.equal(cut(experts, 0, [8], 4, group.rank), part)
        ids = dist.route(torch.arange(6), 6, 4, group=group)
        assert all(torch.equal(part[place], experts[one]) for one, place in enumerate(ids.tolist()) if place in (0, 1))
        assert sum(place in (0, 1) for place in ids.tolist()) == (0 if group.rank == 3 else 2)
    with pytest.raises(ValueError, match="not made of the sections"):
        cut(experts, 0, [4, 4], 4, 0)


def test_passes_that_divide_experts_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a rank is run for all of them; a rank that takes the experts of another changes the sum."""
    options = 'tensor_parallel: option(3), expert_parallel: option("mlp.experts.*")'
    graph, names = ir.parse(_LAYER.replace("OPTIONS", options)), ["Shard", "Localize", "GroupKernels"]
    (*_, last) = passes.verified(graph, passes.steps(graph, names, check=True), names, tmp_path)
    assert "dist.all_reduce" in str(last.graph) and not list(tmp_path.iterdir())
    monkeypatch.setattr(dist, "spans", lambda sections, ranks, rank: [(0, size // ranks) for size in sections])
    with pytest.raises(fuseline.VerificationError, match="Localize"):
        list(passes.verified(graph, passes.steps(graph, names, check=True), names, tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("nn.grouped_linear(x, ids_routed,", "nn.grouped_linear(x, ids,", "ids must be routed there"),
        ("second_part: f32[6, 4, 8] @ shard(0)", "second_part: f32[6, 4, 8]", "computed placement shard"),
        ("dist.shard(second_bias, 0, [6])", "dist.on_first(second_bias)", "computed placement partial"),
        ("grouped_linear(high, ids_routed,", "grouped_linear(high, others,", "high must be whole there"),
        ("aten.sigmoid(up)", "aten.softmax.int(up, -1)", "not known to work on the rows of some experts"),
        ("@ routed = aten.sigmoid(up)", "@ partial = aten.sigmoid(up)", "computed placement routed"),
    ],
)
def test_verify_knows_where_the_rows_of_experts_are(old: str, new: str, why: str) -> None:
    options = 'tensor_parallel: option(3), expert_parallel: option("mlp.experts.*")'
    text = ir.dump(passes.run(ir.parse(_LAYER.replace("OPTIONS", options)), ["Shard"]))
    ir.verify(ir.parse(text))
    assert old in text
    wrong = text.replace(old, new)
    if "others" in new:
        sorted_ids = (
            "    turned: i64[T, 2] = aten.sub.Tensor(ids, 0)\n    others: i64[T, 2] @ routed = dist.route(turned, 6)\n"
        )
        wrong = wrong.replace("    high:", f"{sorted_ids}    high:")
    with pytest.raises(fuseline.VerificationError, match=why):
        ir.verify(ir.parse(wrong))


def test_the_command_line_takes_patterns_and_dumps_replay(tmp_path: Path) -> None:
    divisible("gpt_oss").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = ["dump", str(tmp_path / "model"), "-o", str(out), "--device", "cpu", "--expert-parallel", "*.experts.*"]
    with pytest.raises(fuseline.OptionError, match="expert_parallel=.* is for several ranks"):
        cli.app(command, standalone_mode=False)
    cli.app([*command, "--tensor-parallel", "2"], standalone_mode=False)
    files = sorted(out.glob("[0-9]*.txt"))
    assert 'expert_parallel: option("*.experts.*")' in files[0].read_text()
    assert "dist.route(l0_topk_1, 4, 2)" in files[-1].read_text()
    for before, after in pairwise(files):
        name = after.stem.partition("_")[2]
        if files.index(after) > passes.PASSES.pipeline.index("Quantize"):
            assert ir.dump(passes.run(ir.parse(before.read_text()), [name])) == after.read_text(), name


_ON_TWO = """
import sys, fuseline
from fuseline.runtime.ranks import rank_of
compiled = fuseline.compile(
    sys.argv[1], device="cpu", max_seq_len=64, max_batch_size=3, tensor_parallel=2, expert_parallel=["*.experts.*"]
)
found = compiled.generate([[5], [7, 8, 9]], max_new_tokens=6, stop_token_ids=[])
with open(f"{sys.argv[2]}/{rank_of()}", "w") as file:
    file.write(repr((found, "dist.route(l0_topk_1, 4, 2)" in str(compiled.graph))))
"""


@needs_mpirun
def test_processes_with_experts_of_their_own_generate_the_tokens_of_one(tmp_path: Path) -> None:
    divisible("gpt_oss").save_pretrained(tmp_path / "model")
    whole = fuseline.compile(divisible("gpt_oss"), **_OPTIONS)
    expected = whole.generate([[5], [7, 8, 9]], max_new_tokens=6, stop_token_ids=[])
    script = tmp_path / "script.py"
    script.write_text(_ON_TWO)
    done = mpirun(2, "-m", "mpi4py", str(script), str(tmp_path / "model"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == repr((expected, True))
