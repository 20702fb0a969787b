"""A rule from outside the package, as a user would write one: declared, tested, put into the pipeline, and at work.

If this fails, the way that README describes under "Write a rule in ten minutes" does not work.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import make

import fuseline
from fuseline.passes import PASSES, PassReport, Reject, register, rule
from fuseline.passes.names import aten
from fuseline.passes.testing import check_rule

TEXT = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    r: f32[T, 8] = aten.relu(x)
    y: f32[T, 8] = {call}
    return {result}
"""
AFTER = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    clamp_min: f32[T, 8] = aten.clamp_min(x, 0)
    y: f32[T, 8] = aten.mul.Tensor(clamp_min, clamp_min)  # SquareRelu
    return y
"""

CUBE = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    relu: f32[T, 8] = aten.relu(x)
    y: f32[T, 8] = aten.pow.Tensor_Scalar(relu, 3)  # Wrong
    return y
"""


@rule
class SquareRelu:
    """``relu(x) ** 2`` is a product of what is above zero."""

    def before(x):
        return aten.square(aten.relu(x))

    def after(x):
        positive = aten.clamp_min(x, 0)
        return aten.mul.Tensor(positive, positive)

    def when(m):
        if m["x"].op == "placeholder" and m["x"].name == "never":
            raise Reject("x is the one that is never squared")

    examples = [
        (TEXT.format(call="aten.square(r)", result="y"), AFTER),
        (TEXT.format(call="aten.square(r)", result="(y, r)"), "rejected: r is also used by output"),
        (TEXT.format(call="aten.neg(r)", result="y"), "unchanged"),
    ]


def test_the_examples_hold() -> None:
    check_rule(SquareRelu)


def test_an_example_that_is_wrong_is_found() -> None:
    @rule
    class Wrong:
        """``relu(x) ** 2`` as a cube."""

        def before(x):
            return aten.square(aten.relu(x))

        def after(x):
            return aten.pow.Tensor_Scalar(aten.relu(x), 3)

        examples = [
            (TEXT.format(call="aten.square(r)", result="y"), CUBE),
            (TEXT.format(call="aten.neg(r)", result="y"), "unchanged"),
        ]

    with pytest.raises(AssertionError, match="not close"):
        check_rule(Wrong)


@pytest.fixture
def registered() -> Iterator[None]:
    PASSES.add(SquareRelu, before="FuseSiluMul")
    yield
    PASSES.remove("SquareRelu")


@pytest.mark.usefixtures("registered")
def test_it_runs_in_the_pipeline_by_name_and_position() -> None:
    assert PASSES.pipeline.index("SquareRelu") == PASSES.pipeline.index("FuseSiluMul") - 1
    model = make("llama-relu2")
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, skip=["SquareRelu#0"])
    entry = next(item for item in compiled.report.passes if item.name == "SquareRelu")
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(prompt).logits
    assert float((compiled(prompt).logits - expected).norm() / expected.norm()) < 1e-5
    assert entry.found == 2 and len(entry.fused) == 1, (entry.fused, entry.refused, entry.near)


def test_a_function_is_a_pass_too() -> None:
    @register(after="MergeGateUp")
    def count_values(graph: fuseline.ir.Graph, report: PassReport) -> fuseline.ir.Graph:
        """Changes nothing."""
        report.fused.extend(node.name for node in graph.calls())
        return graph

    try:
        compiled = fuseline.compile(make("llama"), device="cpu", max_seq_len=64, verify=True)
        entry = next(item for item in compiled.report.passes if item.name == "count_values")
        assert len(entry.fused) > 50
        with pytest.raises(ValueError, match="a pass named count_values exists already"):
            register(after="MergeQKV")(count_values)
    finally:
        PASSES.remove("count_values")


@pytest.mark.parametrize("position", [{}, {"before": "FuseRope", "after": "FuseRope"}])
def test_a_position_is_one_neighbour(position: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="say before=NAME or after=NAME"):
        register(**position)(SquareRelu)
    with pytest.raises(fuseline.passes.UnknownPassError, match="no pass of the pipeline is named Nothing"):
        register(after="Nothing")(SquareRelu)
