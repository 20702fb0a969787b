"""Tensors that a model's code makes from numbers alone lie on the device, and are made once where no step changes them."""

from __future__ import annotations

import pytest
import torch

from fuseline import passes
from fuseline.codegen.check import random_case, reference
from fuseline.ir.draws import index_range
from fuseline.ir.graph import is_constant
from fuseline.ir.interpret import interpret
from fuseline.ir.parse import parse

MADE = """\
def made(x: f32[T, 4], i: i64[T, 1], *, T: dim(1, 64)):
    arange: f32[4] = aten.arange.start_step(0, 8, 2, dtype=f32)
    div: f32[4] = aten.div.Tensor(arange, 8)
    zeros: i64[T] = aten.zeros([T], dtype=i64)
    ratio: f32[4] = aten.mul.Tensor(div, T)
    y: f32[T, 4] = aten.mul.Tensor(x, ratio)
    z: f32[T, 1] = aten.gather(y, -1, i)
    rows: f32[T, 1] = aten.index_select(z, 0, zeros)
    return [rows]
"""


def test_they_are_on_the_device_of_the_inputs() -> None:
    inputs = {"x": torch.empty(3, 4, device="meta"), "i": torch.empty(3, 1, dtype=torch.int64, device="meta")}
    (found,) = interpret(parse(MADE), inputs, {})
    assert found.device.type == "meta" and found.shape == (3, 1)


def test_what_no_step_changes_is_constant() -> None:
    graph = parse(MADE)
    assert [node.name for node in graph.calls() if is_constant(node)] == ["arange", "div"]


def test_vectors_are_no_rows_of_a_kernel() -> None:
    (step,) = passes.steps(parse(MADE), ["GroupKernels"])
    assert {node.name: node.meta.get("region") is None for node in step.graph.calls()}["ratio"]
    assert any(item.why.endswith("ratio is a vector: it has no rows") for item in step.report.refused)


def test_indices_stay_below_the_table() -> None:
    nodes = {node.name: node for node in parse(MADE).nodes}
    assert index_range(nodes["i"]) == (0, 4)
    assert index_range(nodes["zeros"], {"T": 7}) == (0, 7)


@pytest.mark.parametrize(("offset", "wanted"), [("add.Tensor(i, 2)", (0, 6)), ("sub.Tensor(i, 2)", (2, 10))])
def test_indices_with_an_offset_stay_in_the_table(offset: str, wanted: tuple[int, int]) -> None:
    """Nor do those that something is taken from begin below its first row."""
    graph = parse(f"""\
def moved(x: f32[T, 8], i: i64[T, 1], *, T: dim(1, 64)):
    j: i64[T, 1] = aten.{offset}
    v: f32[T, 1] = aten.gather(x, -1, j)
    return [v]
""")
    (node,) = (node for node in graph.inputs() if node.name == "i")
    assert index_range(node) == wanted
    reference(graph, random_case(graph, 37, 3, seed=7, device="cpu"))  # raises where an index is none
