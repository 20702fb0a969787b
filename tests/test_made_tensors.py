"""Tensors that a model's code makes from numbers alone lie on the device, and are made once where no step changes them."""

from __future__ import annotations

import torch

from fuseline import passes
from fuseline.ir.draws import index_bound
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
    assert index_bound(nodes["i"]) == 4
    assert index_bound(nodes["zeros"], {"T": 7}) == 7
