"""Which experts a token goes to is found in one kernel, and what they make is added up where it is read."""

from __future__ import annotations

import math
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from families import make
from test_kernels import interpreted, write

import fuseline
from fuseline import passes
from fuseline.codegen.check import random_case
from fuseline.codegen.kernels import emit_kernels
from fuseline.codegen.offline import check_file, load_kernel_file
from fuseline.ir.graph import Graph
from fuseline.ir.parse import parse
from fuseline.ir.types import DTYPES

ROUTE = """\
def route(x: f32[T, {width}], *, T: dim(1, 64)):
    a: f32[T, {width}] = aten.softmax.int(x, -1, f32)
    t: (f32[T, {count}], i64[T, {count}]) = aten.topk(a, {count}, -1, {biggest}, {ordered})
    v: f32[T, {count}] = t[0]
    i: i64[T, {count}] = t[1]
    s: f32[T, 1] = aten.sum.dim_IntList(v, [-1], True)
    w: f32[T, {count}] = aten.div.Tensor(v, s)
    return [w, i]
"""


def route(width: int, count: int, biggest: bool = True, ordered: bool = True) -> Graph:
    text = ROUTE.format(width=width, count=count, biggest=biggest, ordered=ordered)
    (step,) = passes.steps(parse(text), ["GroupKernels"])
    return step.graph


@pytest.mark.parametrize(("width", "count"), [(128, 8), (37, 5), (4, 4), (60, 1)])
def test_one_kernel_finds_experts_and_their_weights(
    width: int, count: int, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    (kernel,) = emit_kernels(route(width, count))
    assert kernel.name == "route"
    assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5
    assert all(found.spill_bytes == 0 for found in check_file(write(kernel, tmp_path)))


PICKED = """\
def route(x: f32[T, {width}], b: f32[{width}], *, T: dim(1, 64)):
    p: f32[T, {width}] = aten.sigmoid(x)
    a: f32[T, {width}] = aten.add.Tensor(p, b)
    t: (f32[T, {count}], i64[T, {count}]) = aten.topk(a, {count})
    i: i64[T, {count}] = t[1]
    v: f32[T, {count}] = aten.gather(p, {dim}, i)
    s: f32[T, 1] = aten.sum.dim_IntList(v, [-1], True)
    w: f32[T, {count}] = aten.div.Tensor(v, s)
    return [w, i]
"""


@pytest.mark.parametrize(("width", "count", "dim"), [(128, 8, -1), (37, 6, 1), (60, 1, -1)])
def test_experts_that_are_found_by_other_numbers_than_their_weights(
    width: int, count: int, dim: int, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """A bias decides who is chosen, and has no part in the weight: that is picked from the row at hand."""
    (step,) = passes.steps(parse(PICKED.format(width=width, count=count, dim=dim)), ["GroupKernels"])
    (kernel,) = emit_kernels(step.graph)
    assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5
    assert all(found.spill_bytes == 0 for found in check_file(write(kernel, tmp_path)))


GIVEN = """\
def picked(x: f32[T, 70], i: i64[T, {count}], *, T: dim(1, 64)):
    v: f32[T, {count}] = aten.gather(x, -1, i)
    return [v]
"""


@pytest.mark.parametrize(("count", "kernels"), [(5, 1), (16, 1), (17, 0)])
def test_columns_that_come_from_memory_are_picked(
    count: int, kernels: int, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    (step,) = passes.steps(parse(GIVEN.format(count=count)), ["GroupKernels"])
    found = emit_kernels(step.graph)
    assert len(found) == kernels
    for kernel in found:
        assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-6


@pytest.mark.parametrize(
    ("width", "count", "how"), [(2048, 8, {}), (64, 32, {}), (64, 4, {"biggest": False}), (64, 4, {"ordered": False})]
)
def test_what_no_kernel_finds_is_left_to_torch(width: int, count: int, how: dict[str, bool]) -> None:
    """Rows that are too long, too many of them, the smallest, or an order that nobody knows."""
    kernels = emit_kernels(route(width, count, **how))
    assert len(kernels) == 2 and not any("topk" in str(kernel.graph) for kernel in kernels)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_kernels_that_look_for_the_largest_are_tried_on_different_numbers(dtype: str) -> None:
    """Of equal ones reference and kernel might take others."""
    graph = parse(PLAIN.replace("f32", dtype).replace("[T, 9]", "[T, 1000]"))
    x = random_case(graph, 19, 3, seed=1, device="cpu")["x"]
    assert x.shape == (19, 1000) and x.dtype == DTYPES[dtype] and x.abs().max() == 4
    assert all(len(row.unique()) == 1000 for row in x) and not torch.equal(x[0], x[1])


def test_masked_numbers_are_no_part_of_the_kernel_that_finds_the_largest() -> None:
    """Of those that a mask makes equal any may be taken; reference and kernel would take others."""
    masked = (
        "    m: bool[T, 64] = aten.gt.Scalar(x, 0.5)\n    b: f32[T, 64] = aten.masked_fill.Scalar(a, m, 0.0)\n    t:"
    )
    text = (
        ROUTE.format(width=64, count=4, biggest=True, ordered=True)
        .replace("    t:", masked)
        .replace("topk(a", "topk(b")
    )
    (step,) = passes.steps(parse(text), ["GroupKernels"])
    *others, last = emit_kernels(step.graph)
    assert last.name == "route" and "masked_fill" not in str(last.graph)
    assert any("masked_fill" in str(kernel.graph) for kernel in others)


def found_in(path: str, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, columns = torch.full((len(x), count), torch.nan), torch.full((len(x), count), -1)
    load_kernel_file(path).launch(x, values, columns)
    return values, columns


PLAIN = """\
def route(x: f32[T, 9], *, T: dim(1, 64)):
    t: (f32[T, 4], i64[T, 4]) = aten.topk(x, 4)
    v: f32[T, 4] = t[0]
    i: i64[T, 4] = t[1]
    return [v, i]
"""


def test_equal_and_infinite_numbers(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The first of equal ones comes first; columns differ even where all that is left is minus infinity."""
    inf = float("inf")
    x = torch.tensor(
        [
            [3.0, 1, 3, 2, 3, 0, 2, 2, 1],
            [-inf, -inf, 5, -inf, -inf, -inf, -inf, -inf, -inf],
            [0.0, -1, inf, -2, -3, -4, -5, inf, -6],
            [torch.nan] * 9,
        ]
    )
    (step,) = passes.steps(parse(PLAIN), ["GroupKernels"])
    (kernel,) = emit_kernels(step.graph)
    values, columns = pool.submit(found_in, str(write(kernel, tmp_path)), x, 4).result()
    assert columns[:3].tolist() == [[0, 2, 4, 3], [2, 0, 1, 3], [2, 7, 0, 1]]
    assert torch.equal(values[:3], x[:3].gather(1, columns[:3]))
    assert ((columns >= 0) & (columns < 9)).all(), (
        "no number is larger than NaN, but there is an expert for each column"
    )


ADDED = """\
def added(x: f32[T, 3, 20], w: f32[T, 3], r: f32[T, 20], *, T: dim(1, 64)):
    u: f32[T, 3, 1] = aten.unsqueeze(w, -1)
    m: f32[T, 3, 20] = aten.mul.Tensor(x, u)
    s: f32[T, 20] = aten.sum.dim_IntList(m, [-2])
    y: f32[T, 20] = aten.add.Tensor(r, s)
{more}    return [{results}]
"""


def test_products_are_made_where_they_are_added_up(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    (step,) = passes.steps(parse(ADDED.format(more="", results="y")), ["GroupKernels"])
    (kernel,) = emit_kernels(step.graph)
    assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5


@pytest.mark.parametrize("dims", ["[-2]", "-2"])
def test_a_sum_may_name_its_dim_by_a_number(dims: str) -> None:
    text = ADDED.format(more="", results="y").replace("[-2]", dims)
    (step,) = passes.steps(parse(text), ["GroupKernels"])
    assert len(emit_kernels(step.graph)) == 1


@pytest.mark.parametrize(
    ("more", "results"),
    [
        ("", "y, m"),
        ("    e: f32[T, 3, 20] = aten.exp(m)\n", "y, e"),
        ("    z: f32[T, 3, 1] = aten.exp(u)\n", "y, z"),
    ],
)
def test_products_that_others_read_have_a_kernel_of_their_own(
    more: str, results: str, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Rows of choices and rows of tokens are no results of one kernel."""
    (step,) = passes.steps(parse(ADDED.format(more=more, results=results)), ["GroupKernels"])
    for kernel in emit_kernels(step.graph):
        written = [node.meta["type"].rank for node in kernel.graph.output_node().all_input_nodes]
        assert len(set(written)) == 1, str(kernel.graph)
        assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5


@pytest.mark.parametrize(("scheme", "kernels"), [("int8d", 1), ("int8g32", 0), ("int8", 0)])
def test_rows_become_codes_in_a_kernel_only_as_steps_round_them(scheme: str, kernels: int) -> None:
    """Other schemes, which are for weights, have other layouts."""
    text = f'def f(x: f32[T, 64], *, T: dim(1, 64)):\n    q: {scheme}[T, 64] = nn.quantize(x, "{scheme}")\n    return [q]\n'
    (step,) = passes.steps(parse(text), ["GroupKernels"])
    assert len(emit_kernels(step.graph)) == kernels


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "qwen3_moe"])
def test_a_router_is_two_kernels(family: str) -> None:
    """The product with its epilogue, and the choice; a choice among groups of which there is one is no work."""
    compiled = fuseline.compile(make(family), device="cpu", max_seq_len=64)
    names = [re.sub(r"_\d+$", "", kernel.name) for kernel in compiled.kernels]
    assert names.count("route") == 1 and names.index("route") == names.index("gate") + 1
    assert not compiled.report.other_operators


STRUCK = """\
def struck(x: f32[T, {width}], i: i64[T, 1], *, T: dim(1, 64)):
    m: (f32[T, 1], i64[T, 1]) = aten.max.dim(x, -1, True)
    most: f32[T, 1] = m[0]
    place: i64[T, 1] = m[1]
    a: f32[T, {width}] = aten.clamp.Tensor(x, None, most)
    b: f32[T, {width}] = aten.clamp.Tensor(a, most)
    y: f32[T, {width}] = aten.scatter.value(x, -1, place, {value})
    z: f32[T, {width}] = aten.scatter.value(x, -1, i, {value})
    return [most, place, a, b, y, z]
"""


@pytest.mark.parametrize(("width", "value"), [(4, -math.inf), (37, 0.5), (128, 0), (1, 2.0)])
def test_the_largest_is_struck_out(width: int, value: float, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    (step,) = passes.steps(parse(STRUCK.format(width=width, value=value)), ["GroupKernels"])
    kernels = emit_kernels(step.graph)
    assert len(kernels) == 2  # the column of i is written apart
    for kernel in kernels:
        assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-6
        assert all(found.spill_bytes == 0 for found in check_file(write(kernel, tmp_path)))


@pytest.mark.parametrize(
    ("old", "new"),
    [("max.dim(x, -1, True)", "max.dim(x, -1, False)"), ("max.dim(x, -1, True)", "max.dim(x, 0, True)")],
    ids=["no dim kept", "of all tokens"],
)
def test_other_maxima_are_left_to_torch(old: str, new: str) -> None:
    text = STRUCK.format(width=8, value=0.5).replace(old, new)
    shape = "T" if new.endswith("False)") else "1, 8"
    for name in ("most: f32", "place: i64"):
        text = text.replace(f"{name}[T, 1]", f"{name}[{shape}]")
    text = text.replace("m: (f32[T, 1], i64[T, 1])", f"m: (f32[{shape}], i64[{shape}])")
    text = "\n".join(line for line in text.splitlines() if not line.strip().startswith(("a:", "b:", "y:")))
    (step,) = passes.steps(parse(text.replace("[most, place, a, b, y, z]", "[most, place, z]")), ["GroupKernels"])
    assert "max.dim" not in "".join(str(kernel.graph) for kernel in emit_kernels(step.graph))


def test_experts_taken_one_after_the_other_are_found_in_kernels() -> None:
    compiled = fuseline.compile(make("phimoe"), device="cpu", max_seq_len=64)
    grouping = next(item for item in compiled.report.passes if item.name == "GroupKernels")
    assert not [item for item in grouping.refused if "no kernel" in item.why]
    assert [kernel.name for kernel in compiled.kernels if "max.dim" in str(kernel.graph)] == ["largest", "largest_2"]
