"""Rows that are where their experts are, in the text of graphs: what a rank computes, and what the checks of placements say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensor_parallel import on_ranks

import fuseline
from fuseline import ir, passes
from fuseline.codegen.kernels import grouped_spec
from fuseline.ir import dist
from fuseline.ir.dist import Mirror
from fuseline.ir.graph import type_of
from fuseline.ir.interpret import interpret
from fuseline.ir.ops import op_name
from fuseline.ir.weights import cut
from fuseline.runtime.bench.floor import decode_bytes, prefill_operations
from fuseline.runtime.groups import simulated

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
    specs = [grouped_spec(node) for node in local.calls() if op_name(node.target) == "nn.grouped_linear"]
    assert {(spec.num_experts, spec.chosen_from) for spec in specs} == {(2, 6)}
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
