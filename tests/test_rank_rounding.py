"""Parts of rows that are rounded in each step: the codes of whole rows, in models and in graphs."""

from __future__ import annotations

import pytest
import torch
from families import make
from quantized_models import wide
from tensor_parallel import on_ranks
from test_rank_kernels import ROUNDED
from test_tensor_parallel import cut_and_kept, plan_line, tokens

import fuseline
from fuseline import ir, passes
from fuseline.ir.interpret import interpret, random_inputs
from fuseline.ir.quantized import unpack
from fuseline.ir.schemes import scheme_of

SCHEMES = ["int8d", "fp8"]


@pytest.mark.parametrize(("name", "scheme"), [("llama", "int8-dynamic"), ("gpt2", "fp8")])
def test_row_parallel_projections_are_divided(name: str, scheme: str) -> None:
    """Ranks tell each other one number a row: no rows are put together, neither in front of a projection nor after it."""
    model = wide(name)
    whole, expected = tokens(model, quantization=scheme)
    compiled, found = tokens(model, quantization=scheme, tensor_parallel=2, simulate=True)
    assert found == expected
    ids = [list(range(30))]
    left, right = compiled(ids).logits, whole(ids).logits
    errors = (left - right).norm(dim=-1) / right.norm(dim=-1)
    assert errors.median() <= 1e-5 and errors.max() <= 0.05, "the last digit decides few codes"
    gathered = [line for line in str(compiled.graph).splitlines() if "dist.all_gather" in line]
    assert len(gathered) == 2 * compiled.report.layers
    assert all("_absmax_gathered: f32[T, 2]" in line for line in gathered)
    cut, kept = cut_and_kept(compiled)
    assert len(cut) == 4 * compiled.report.layers + 2 and not kept
    report = next(item for item in compiled.report.passes if item.name == "Shard")
    assert not any("inputs gathered" in str(item) for item in report.near)
    if name == "llama":
        assert plan_line(compiled).startswith("agrees with base_model_tp_plan in 8 of 8")


@pytest.mark.parametrize(("name", "scheme"), [("mixtral", "fp8"), ("gpt_oss", "int8-dynamic")])
def test_rows_of_experts_are_rounded_in_parts(name: str, scheme: str) -> None:
    """One number for each choice of a token goes to the other ranks; no rows of theirs."""
    model = wide(name)
    _, expected = tokens(model, quantization=scheme)
    compiled, found = tokens(model, quantization=scheme, tensor_parallel=2, simulate=True)
    assert found == expected
    gathered = [line.split()[0] for line in str(compiled.graph).splitlines() if "dist.all_gather" in line]
    assert len(gathered) == 2 * compiled.report.layers and all("_absmax_gathered" in line for line in gathered)
    assert str(compiled.graph).count("_absmax_gathered: f32[T, 2, 2]") == compiled.report.layers
    assert not cut_and_kept(compiled)[1].keys() & {"l0_experts", "l0_experts_1"}


def test_rows_with_a_dim_in_front_are_rounded_whole() -> None:
    """The few coefficients by which gemma3n mixes its streams are rows ``[1, T, 2]``."""
    model = make("gemma3n_text")
    whole, _ = tokens(model, quantization="int8-dynamic")
    compiled, _ = tokens(model, quantization="int8-dynamic", tensor_parallel=2, simulate=True)
    assert "f32[1, T, 2]" in str(compiled.graph)
    ids = [list(range(30))]
    left, right = compiled(ids).logits, whole(ids).logits
    errors = (left - right).norm(dim=-1) / right.norm(dim=-1)
    assert errors.median() <= 1e-5 and errors.max() <= 0.05


def test_a_projection_that_is_to_be_whole_reads_whole_rows() -> None:
    model = wide("llama")
    _, expected = tokens(model, quantization="fp8")
    options = {"quantization": "fp8", "tensor_parallel": 2, "simulate": True}
    compiled, found = tokens(model, replicated=["*.down_proj"], **options)
    assert found == expected
    text = str(compiled.graph)
    assert 'l0_mul_8_fp8: fp8[T, 160] = nn.quantize(l0_mul_8_gathered, "fp8")' in text
    assert "l0_mul_8_absmax" not in text and "l0_reshape_absmax" in text
    _, kept = cut_and_kept(compiled)
    assert kept["l0_down_proj"] == "every rank computes it whole: '*.down_proj' is not to be cut"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_of_parts_are_those_of_whole_rows(scheme: str) -> None:
    """With a vector that rows are divided by, of which each rank takes its part."""
    how, graph = scheme_of(scheme), ir.parse(ROUNDED.format(scheme=scheme))
    assert how is not None
    (shard,) = passes.steps(graph, ["Shard"], check=True)
    assert "s_part: f32[160] @ shard(0) = dist.shard(s, 0, [160])" in str(shard.graph)
    assert "act_absmax: f32[T, 2] @ shard(1) = nn.absmax(act, 2, s_part)" in str(shard.graph)
    (local,) = passes.steps(shard.graph, ["Localize"], check=True)
    inputs, weights = random_inputs(graph, {"T": 7}, seed=1)
    weights["s"] = weights["s"].abs() + 0.1
    for values, name in ((inputs, "x"), (weights, "u.weight")):
        # Sums of whole numbers have the same digits however wide the product is that a library makes them for.
        values[name] = (8 * values[name]).round()
    (expected,) = interpret(graph, inputs, weights)
    (found,) = interpret(shard.graph, inputs, weights)
    assert torch.equal(found, expected)
    for (part,) in on_ranks(local.graph, 2, inputs, weights):
        assert (part - expected).norm() <= 1e-6 * expected.norm()
    for wanted in ("codes", "d_codes"):
        whole, parts = (returning(item, wanted) for item in (graph, local.graph))
        codes, factors, _ = unpack(interpret(whole, inputs, weights)[0], how, 160)
        packed = [unpack(part, how, 80) for (part,) in on_ranks(parts, 2, inputs, weights)]
        assert torch.equal(torch.cat([part.float() for part, _, _ in packed], 1), codes.float())
        assert all(torch.equal(part, factors) for _, part, _ in packed)


def test_rows_are_selected_before_they_are_rounded_or_after_the_product() -> None:
    """Codes are no rows that could be selected: whole rows are rounded later, and parts of rows are multiplied first."""
    names = ["Shard", "Localize", "SelectRows"]
    for option, line in (
        (", tensor_parallel: option(2)", "sampled: f32[R, 96] = aten.index_select(down, 0, rows)"),
        ("", "sampled: f32[R, 96] = aten.index_select(x, 0, rows)"),
    ):
        graph = ir.parse(ROUNDED.format(scheme="int8d").replace(", tensor_parallel: option(2)", option))
        (*_, last) = passes.steps(graph, names, check=True)
        assert line in str(last.graph)


def returning(graph: ir.Graph, name: str) -> ir.Graph:
    """A graph that returns another of its values, or a rank's part of it."""
    twin = graph.copy()
    nodes = {node.name: node for node in twin.calls()}
    twin.output_node().args = (nodes.get(f"{name}_part", nodes[name]),)
    return twin


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('nn.quantize(x, "int8", 1, None, m)', "cannot be rounded as int8 by f32"),
        ('nn.quantize(x, "fp8", 16, None, m)', "cannot be rounded as fp8 by f32"),
        ('nn.quantize(x, "fp8", 1, None, x)', None),
        ("dist.all_gather(c, 1, 2)", "parts of rows in fp8 have factors of their own"),
    ],
)
def test_what_makes_no_sense_is_refused(line: str, why: str | None) -> None:
    kind = line.split('"')[1] + "[T, 32]" if '"' in line else "fp8[T, 64]"
    text = f"""\
def f(x: f32[T, 32], m: f32[T, 2], c: fp8[T, 32], *, T: dim(1, 8)):
    y: {kind} = {line}
    return y
"""
    if why is None:
        ir.verify(ir.parse(text))
        return
    with pytest.raises(fuseline.VerificationError, match=why):
        ir.verify(ir.parse(text))
