"""Experts divided among ranks: the tokens of the whole model, who has which expert, and when it is done without being asked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from quantized_models import wide
from tensor_parallel import mpirun, needs_mpirun
from test_tensor_parallel import _OPTIONS, cut_and_kept, divisible, plan_line, tokens
from torch.fx import Node

import fuseline
from fuseline import ir, passes
from fuseline.ir.dist import MEETINGS
from fuseline.ir.graph import type_of
from fuseline.ir.ops import op_name
from fuseline.ir.schemes import ALIASES
from fuseline.runtime import cli

_EXPERTS = {"expert_parallel": ["*.experts.*"], "simulate": True}


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
    assert meetings == 2 * compiled.report.layers + 1, "ranks meet as often as where each expert is cut"
    if "ranks" in dict(compiled.report.rows()) and model.ep_plan:  # transformers 5.17 states it for no model
        assert plan_line(compiled).endswith("with base_model_ep_plan in 2 of 2 kinds of projections")


@pytest.mark.parametrize(("name", "more", "ranks"), [("gpt_oss", {}, 2), ("qwen3_moe", {"num_local_experts": 6}, 4)])
@pytest.mark.parametrize("kinds", [("int8", "int4g32"), ("fp8", "int8-dynamic")], ids=" ".join)
def test_rounded_experts_are_divided_with_their_factors(
    kinds: tuple[str, str], name: str, more: dict[str, int], ranks: int
) -> None:
    """Of one token, a step sends rows to two experts: most ranks have nothing to do."""
    model = divisible(name, **more) if more else wide(name)
    schemes = {"*.experts.gate_up_proj": kinds[0], "*.experts.down_proj": kinds[1]}
    whole, expected = tokens(model, quantization=schemes)
    compiled, found = tokens(model, quantization=schemes, tensor_parallel=ranks, verify=True, **_EXPERTS)
    assert found == expected
    alone = [item.generate([[7]], max_new_tokens=6, stop_token_ids=[]) for item in (whole, compiled)]
    assert alone[0] == alone[1]
    held = [type_of(node.args[2]) for node in grouped(compiled)]  # type: ignore[arg-type]
    assert {(kind.dtype, kind.shape[0]) for kind in held} == {(ALIASES.get(kind, kind), 2) for kind in kinds}


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
    if here == 6 or model.ep_plan:
        assert f"with {plan} kinds of projections" in plan_line(compiled)


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
