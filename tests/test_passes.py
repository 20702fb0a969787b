"""Passes that are no rules: text in, text out, refusals included."""

from __future__ import annotations

import pytest
import torch

from fuseline import ir, passes
from fuseline.ir.interpret import interpret, random_inputs


def same_numbers(before: str, after: ir.Graph, tokens: int = 5) -> None:
    graph = ir.parse(before)
    inputs, weights = random_inputs(graph, {"T": tokens}, seed=3)
    more = {node.name: torch.tensor([tokens - 1, 0]) for node in after.inputs() if node.name == "rows"}
    expected = interpret(graph, inputs, weights)
    found = interpret(after, {**inputs, **more}, weights)
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left[[tokens - 1, 0]] if more else left, right, rtol=1e-5, atol=1e-6)


def run(name: str, text: str) -> tuple[ir.Graph, passes.PassReport]:
    graph = ir.parse(text)
    ir.verify(graph)
    (step,) = passes.steps(graph, [name], check=True)
    assert ir.dump(graph) == text, "a pass leaves its input as it was"
    return step.graph, step.report


GATE_UP = """\
def f(x: f32[T, 4], y: f32[T, 4], *, T: dim(1, 64)):
    wg: f32[6, 4] = weight("gate")
    g: f32[T, 6] = aten.linear(x, wg)
    a: f32[T, 6] = aten.silu(g)
    wu: f32[6, 4] = weight("up")
    u: f32[T, 6] = aten.linear({up}, wu{bias})
    h: f32[T, 6] = aten.mul.Tensor(a, u)
    return h
"""


def test_merge_gate_up() -> None:
    text = GATE_UP.format(up="x", bias="")
    after, report = run("MergeGateUp", text)
    assert report.fused == ["gate_up"]
    assert "gate_up: f32[T, 12] = aten.linear(x, gate_up_weight)" in str(after)
    assert "g: f32[T, 6] = aten.slice.Tensor(gate_up, -1, 0, 6)" in str(after)
    same_numbers(text, after)


def test_merge_gate_up_leaves_projections_of_other_rows() -> None:
    text = GATE_UP.format(up="y", bias="")
    after, report = run("MergeGateUp", text)
    assert (str(after), report.found) == (text, 0)


@pytest.mark.parametrize("name", ["MergeGateUp", "FuseRMSNorm", "MergeDuplicates"])
def test_a_pass_with_nothing_to_do_gives_back_the_graph(name: str) -> None:
    """Nothing is copied for it, and there is nothing new to check or to dump."""
    graph = ir.parse(GATE_UP.format(up="y", bias=""))
    (step,) = passes.steps(graph, [name])
    assert step.graph is graph


def test_a_switched_off_application_leaves_the_graph_as_it_was() -> None:
    text = GATE_UP.format(up="x", bias="")
    graph = ir.parse(text)
    skip = passes.Switches(sites={"MergeGateUp": frozenset({0})})
    (step,) = passes.steps(graph, ["MergeGateUp"], skip=skip)
    assert (str(graph), str(step.graph)) == (text, text)
    assert [item.why for item in step.report.refused] == ["switched off (application 0 of MergeGateUp)"]


def test_merge_gate_up_refuses_half_a_bias() -> None:
    text = GATE_UP.format(up="x", bias=", b").replace("    wu:", '    b: f32[6] = weight("bias")\n    wu:')
    after, report = run("MergeGateUp", text)
    assert str(after) == text
    assert [item.why for item in report.refused] == ["only some of the projections have a bias"]


def test_a_bias_that_is_none_is_no_bias() -> None:
    text = GATE_UP.format(up="x", bias=", None").replace("aten.linear(x, wg)", "aten.linear(x, wg, None)")
    after, report = run("MergeGateUp", text)
    assert report.fused == ["gate_up"]
    same_numbers(text, after)


QKV = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    wq: f32[16, 8] = weight("q")
    q: f32[T, 16] = aten.linear(x, wq)
    qh: f32[T, 4, 4] = aten.reshape(q, [T, 4, 4])
    wk: f32[8, 8] = weight("k")
    k: f32[T, 8] = aten.linear(x, wk)
    kh: f32[T, 2, 4] = aten.reshape(k, [T, 2, 4])
    wv: f32[8, 8] = weight("v")
    v: f32[T, 8] = aten.linear(x, wv)
    vh: f32[T, 2, 4] = aten.reshape(v, [T, 2, 4])
    o: f32[T, 4, 4] = nn.attention(qh, kh, vh, 0, 0.5)
    return o
"""


def test_merge_qkv() -> None:
    after, report = run("MergeQKV", QKV)
    assert report.fused == ["qkv"]
    assert "qkv: f32[T, 32] = aten.linear(x, qkv_weight)" in str(after)
    assert "k: f32[T, 8] = aten.slice.Tensor(qkv, -1, 16, 24)" in str(after)
    same_numbers(QKV, after)


def test_page_attention_writes_before_it_reads() -> None:
    after, report = run("PageAttention", QKV)
    assert report.fused == ["o"]
    text = str(after)
    assert 'k_cache_0: f32[C, 2, 4] = cache("k", 0)' in text
    assert "l0_k_written: f32[C, 2, 4] = nn.cache_write(k_cache_0, kh, slots)" in text
    call = "nn.paged_attention(qh, l0_k_written, l0_v_written, block_tables, query_starts, context_lens, 16, 0.5)"
    assert call in text


SLIDING = """\
def f(x: f32[T, 2, 4], *, T: dim(1, 64)):
    w: f32[2] = weight("sinks")
    b: f32[1, T, 2, 4] = aten.reshape(x, [1, T, 2, 4])
    o: f32[1, T, 2, 4] = nn.attention(b, b, b, 0, 0.5, kind="sliding", window=2, sinks=w)
    s: f32[T, 2, 4] = aten.select.int(o, -4, 0)
    return s
"""


def test_what_attention_is_given_by_name_is_kept() -> None:
    """Otherwise a window would be forgotten, or a weight of the old graph stand in the new one."""
    after, _ = run("DropBatchDim", SLIDING)
    call = 'nn.attention(x, x, x, 0, 0.5, kind="sliding", window=2, sinks=w)'
    assert call in str(after)
    same_numbers(SLIDING, after)
    after, _ = run("PageAttention", str(after))
    assert '16, 0.5, kind="sliding", window=2, sinks=w)' in str(after)


def test_a_written_layer_norm_is_no_rms_norm_of_a_difference() -> None:
    text = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    m: f32[T, 1] = aten.mean.dim(x, [-1], True)
    c: f32[T, 8] = aten.sub.Tensor(x, m)
    s: f32[T, 8] = aten.pow.Tensor_Scalar(c, 2)
    v: f32[T, 1] = aten.mean.dim(s, [-1], True)
    e: f32[T, 1] = aten.add.Tensor(v, 1e-05)
    r: f32[T, 1] = aten.rsqrt(e)
    n: f32[T, 8] = aten.mul.Tensor(c, r)
    w: f32[8] = weight("w")
    y: f32[T, 8] = aten.mul.Tensor(w, n)
    return y
"""
    after = passes.run(ir.parse(text), [name for name in passes.PASSES.pipeline if name != "SelectRows"])
    assert "y: f32[T, 8] = nn.layer_norm(x, w, None, 1e-05)" in str(after)
    same_numbers(text, after)


def test_page_attention_takes_the_block_size_from_the_graph() -> None:
    after, _ = run("PageAttention", QKV.replace("T: dim(1, 64)", "T: dim(1, 64), kv_block: option(32)"))
    assert "context_lens, 32, 0.5)" in str(after)


HEAD = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-05)
    w: f32[9, 8] = weight("head")
    y: f32[T, 9] = aten.linear(n, w)
    z: f32[T, 9] = aten.tanh(y)
    return z
"""


def test_select_rows_moves_up_to_the_norm() -> None:
    after, _ = run("SelectRows", HEAD)
    assert "sampled: f32[R, 8] = aten.index_select(x, 0, rows)" in str(after)
    assert "n: f32[R, 8] = nn.rms_norm(sampled, None, 1e-05)" in str(after)
    same_numbers(HEAD, after)


def test_select_rows_stops_at_work_across_rows() -> None:
    text = HEAD.replace("aten.tanh(y)", "aten.softmax.int(y, -2)")
    after, _ = run("SelectRows", text)
    assert "sampled: f32[R, 9] = aten.index_select(z, 0, rows)" in str(after)
    same_numbers(text, after)


def test_drop_batch_dim_keeps_it_for_what_it_does_not_know() -> None:
    text = """\
def f(tokens: i64[T], *, T: dim(1, 64)):
    w: f32[9, 4] = weight("embed")
    t: i64[1, T] = aten.unsqueeze(tokens, -2)
    e: f32[1, T, 4] = aten.embedding(w, t)
    r: f32[1, T, 4] = aten.roll(e, [1], [2])
    s: f32[T, 4] = aten.select.int(r, -3, 0)
    return s
"""
    after, report = run("DropBatchDim", text)
    assert [item.site for item in report.refused] == ["r"]
    assert "e: f32[T, 4] = aten.embedding(w, tokens)" in str(after)
    same_numbers(text, after)


def test_drop_batch_dim_drops_that_of_a_single_head_too() -> None:
    """Such as the keys that all heads of latent attention share: a projection of them is one of rows."""
    text = """\
def f(tokens: i64[T], *, T: dim(1, 64)):
    w: f32[9, 4] = weight("embed")
    p: f32[6, 4] = weight("p")
    t: i64[1, T] = aten.unsqueeze(tokens, -2)
    e: f32[1, T, 4] = aten.embedding(w, t)
    h: f32[1, 1, T, 4] = aten.reshape(e, [1, 1, T, 4])
    y: f32[1, 1, T, 6] = aten.linear(h, p)
    x: f32[1, 3, T, 6] = aten.expand(y, [1, 3, T, 6])
    z: f32[1, T, 3, 6] = aten.transpose.int(x, -3, -2)
    s: f32[T, 3, 6] = aten.select.int(z, -4, 0)
    return s
"""
    after, report = run("DropBatchDim", text)
    assert "y: f32[T, 6] = aten.linear(e, p)" in str(after) and not report.refused
    same_numbers(text, after)
    after, _ = run("SinkTransposes", str(after))
    assert "aten.transpose" not in str(after) and "x_rows: f32[T, 3, 6] = aten.expand(x_single, [T, 3, 6])" in str(
        after
    )
    same_numbers(text, after)


def test_sink_transposes_cancels_what_meets() -> None:
    text = """\
def f(x: f32[T, 3, 4], c: f32[T, 4], *, T: dim(1, 64)):
    h: f32[3, T, 4] = aten.transpose.int(x, -3, -2)
    u: f32[1, T, 4] = aten.unsqueeze(c, -3)
    m: f32[3, T, 4] = aten.mul.Tensor(h, u)
    y: f32[T, 3, 4] = aten.transpose.int(m, -3, -2)
    return y
"""
    after, _ = run("SinkTransposes", text)
    assert "transpose" not in str(after)
    same_numbers(text, after)


def test_sink_transposes_moves_through_rope_of_neighbours() -> None:
    """Where it did not, attention of cohere and glm4 turned its heads in many kernels, and ranks could not divide them."""
    text = """\
def f(x: f32[T, 3, 4], c: f32[T, 4], *, T: dim(1, 64)):
    h: f32[3, T, 4] = aten.transpose.int(x, -3, -2)
    even: f32[3, T, 2] = aten.slice.Tensor(h, -1, 0, 4, 2)
    odd: f32[3, T, 2] = aten.slice.Tensor(h, -1, 1, 4, 2)
    s: f32[3, T, 2, 2] = aten.stack([odd, even], -1)
    turned: f32[3, T, 4] = aten.reshape(s, [3, T, 4])
    u: f32[1, T, 4] = aten.unsqueeze(c, -3)
    half: f32[1, T, 2] = aten.slice.Tensor(u, -1, 0, 2)
    twice: f32[1, T, 4] = aten.repeat_interleave.self_int(half, 2, -1)
    m: f32[3, T, 4] = aten.mul.Tensor(turned, twice)
    y: f32[T, 3, 4] = aten.transpose.int(m, -3, -2)
    return y
"""
    after, _ = run("SinkTransposes", text)
    assert "transpose" not in str(after)
    same_numbers(text, after)


ONE_OF_GROUPS = """\
def f(x: f32[T, 6], g: f32[T, {groups}], *, T: dim(1, 64)):
    t: (f32[T, {taken}], i64[T, {taken}]) = aten.topk(g, {taken})
    i: i64[T, {taken}] = t[1]
    z: f32[T, {groups}] = aten.zeros_like(g)
    c: f32[T, {groups}] = aten.scatter.value(z, {dim}, i, {value})
    u: f32[T, {groups}, 1] = aten.unsqueeze(c, -1)
    e: f32[T, {groups}, {size}] = aten.expand(u, [T, {groups}, {size}])
    r: f32[T, 6] = aten.reshape(e, [T, 6])
    b: bool[T, 6] = aten.to.dtype(r, bool)
    n: bool[T, 6] = aten.bitwise_not(b)
    m: f32[T, 6] = {selected}
    y: f32[T, 6] = aten.mul.Tensor(m, 2.0)
    return y
"""
FILLED = "aten.masked_fill.Scalar(x, n, -inf)"


@pytest.mark.parametrize(
    ("groups", "taken", "dim", "value", "selected", "kept"),
    [
        (1, 1, -1, 1, FILLED, "x"),
        (3, 3, 1, 1, FILLED, "x"),
        (2, 2, -1, 0, "aten.where.self(n, x, m0)", "x"),
        (2, 2, -1, 1, "aten.where.self(n, m0, x)", "x"),
        (2, 2, -1, 1, "aten.where.self(b, m0, x)", "m0"),
        (2, 1, -1, 1, FILLED, None),  # some are masked
        (2, 2, -1, 0, FILLED, None),  # all are
        (2, 2, -1, 0.5, FILLED, None),  # a number that some types round
        (2, 2, 0, 1, FILLED, None),  # the columns of rows are written to rows
    ],
)
def test_masks_that_are_the_same_everywhere_are_dropped(
    groups: int, taken: int, dim: int, value: float, selected: str, kept: str | None
) -> None:
    text = ONE_OF_GROUPS.format(
        groups=groups, taken=taken, dim=dim, value=value, selected=selected, size=6 // groups
    ).replace("    t: (", "    m0: f32[T, 6] = aten.exp(x)\n    t: (" if "m0" in selected else "    t: (")
    if dim == 0:  # valid for the text; no row has that number
        graph = ir.parse(text)
        (step,) = passes.steps(graph, ["DropUniformMasks"])
        assert not step.report.fused
        return
    after, report = run("DropUniformMasks", text)
    assert report.fused == ([kept] if kept else [])
    assert ("topk" in str(after)) == (kept is None)
    if kept:
        assert f"y: f32[T, 6] = aten.mul.Tensor({kept}, 2.0)" in str(after)
    same_numbers(text, after)


def test_masks_of_long_computations_are_no_work_to_tell() -> None:
    lines = "".join(f"    a{place + 1}: f32[T, 6] = aten.neg(a{place})\n" for place in range(1500))
    text = "def f(a0: f32[T, 6], *, T: dim(1, 64)):\n" + lines
    text += "    b: bool[T, 6] = aten.gt.Scalar(a1500, 0.0)\n    m: f32[T, 6] = aten.masked_fill.Scalar(a0, b, 0.0)\n    return m\n"
    (step,) = passes.steps(ir.parse(text), ["DropUniformMasks"])
    assert ir.dump(step.graph) == text and not step.report.found


def test_unknown_pass_is_named() -> None:
    with pytest.raises(passes.UnknownPassError, match="FuseNothing"):
        passes.run(ir.parse(HEAD), ["FuseNothing"])


GROUPS = """\
def f(x: f32[T, 8], r: f32[T, 6], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-05)
    w: f32[6, 8] = weight("w")
    y: f32[T, 6] = aten.linear(n, w)
    a: f32[T, 6] = aten.relu(y)
    s: f32[T, 6] = aten.add.Tensor(a, r)
    m: f32[T, 6] = nn.rms_norm(s, None, 1e-05)
    v: f32[5, 6] = weight("v")
    z: f32[T, 5] = aten.linear(m, v)
    return (z, s)
"""


def test_grouping_puts_the_work_around_a_matmul_into_its_kernel() -> None:
    after, report = run("GroupKernels", GROUPS)
    inside = {node.name: node.meta["region"].index for node in after.calls() if node.meta.get("region")}
    assert inside["n"] == inside["y"] == inside["a"] == inside["s"] != inside["m"] == inside["z"]
    assert [(item.site, item.why) for item in report.refused] == [("y", "m: nn.rms_norm does not fit on a tile of y")]
    same_numbers(GROUPS, after)


def test_grouping_never_makes_a_value_pass_a_kernel_twice() -> None:
    """``b`` needs ``a`` through a softmax over everything outside: it cannot be in the kernel of ``y``."""
    text = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    w: f32[6, 8] = weight("w")
    y: f32[T, 6] = aten.linear(x, w)
    a: f32[T, 6] = aten.cumsum(y, -1)
    b: f32[T, 6] = aten.add.Tensor(y, a)
    return b
"""
    after, report = run("GroupKernels", text)
    regions = {node.name: node.meta.get("region") for node in after.calls()}
    assert regions["a"] is None
    assert regions["b"] != regions["y"]
    assert report.refused
    same_numbers(text, after)
