"""The text form: exact round trips, never executed, and errors that show where."""

from __future__ import annotations

import pytest
import torch
from families import REQUIRED, make
from hypothesis import given
from hypothesis import strategies as st

from fuseline import ir, passes
from fuseline.ir.capture import capture
from fuseline.ir.skeleton import skeleton
from fuseline.ir.types import Dim, TensorType, parse_size

TEXT = """\
def decoder(tokens: i64[T], x: f32[T, 8], *, T: dim(1, 64), kv_block: option(16)):
    w: f32[6, 8] = weight("model.layers.0.proj.weight")
    s: f32[()] = weight("scale")
    with kernel("proj"):
        n: f32[T, 8] = nn.rms_norm(x, None, 1e-05)  # FuseRMSNorm; modeling_llama.py:64
        y: f32[T, 6] = aten.linear(n, w)
    with kernel("proj"):
        z: f32[T, 6] = aten.mul.Tensor(y, s)
    parts: (f32[T, 3], f32[T, 3]) = aten.split.Tensor(z, 3, -1)
    a: f32[T, 3] = parts[0]
    b: f32[T, 3] = aten.clamp(a, -inf, 2.5)
    c: bf16[T, 3] = aten.to.dtype(b, bf16)
    d: bf16[3*T] = aten.reshape(c, [3*T])
    return (d, y)
"""


def test_round_trip_is_exact() -> None:
    graph = ir.parse(TEXT)
    assert ir.dump(graph) == TEXT
    assert ir.dump(ir.parse(ir.dump(graph))) == TEXT
    assert ir.dump(graph.copy()) == TEXT
    ir.verify(graph)


@pytest.mark.parametrize("name", REQUIRED)
def test_every_stage_of_every_family_round_trips_and_replays(name: str) -> None:
    """The text after a pass is what that pass makes of the text before it, to the byte."""
    graph = capture(skeleton(make(name), torch.float32))
    before = ir.dump(graph)
    assert ir.dump(ir.parse(before)) == before
    for step in passes.steps(graph, check=True):
        text = ir.dump(step.graph)
        assert ir.dump(ir.parse(text)) == text, step.name
        assert ir.dump(passes.run(ir.parse(before), [step.name])) == text, step.name
        before = text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("aten.linear(n, w)", "aten.linear(x, v)", "unknown name v"),
        ("aten.linear(n, w)", "aten.linnear(n, w)", "unknown operator aten.linnear"),
        ("aten.linear(n, w)", "__import__('os').system('true')", "unknown operator"),
        ("y: f32[T, 6] = aten", "y: f33[T, 6] = aten", "unknown element type f33"),
        ("w: f32[6, 8] =", "w: f32[6, 8] @ split(0) =", "unknown placement split(0)"),
        ("w: f32[6, 8] =", "w: f32[6, 8] @ shard(2) =", "shard(2) names no dim of a type of 2"),
        ("y: f32[T, 6] = aten", "y = aten", "expected `name: type = op"),
        ("y: f32[T, 6] = aten", "n: f32[T, 6] = aten", "the name n is taken"),
        ("    return (d, y)\n", "", "the graph returns nothing"),
        ("T: dim(1, 64)", "T: 64", "dim T needs a range"),
        ("def decoder", "deff decoder", "not Python syntax"),
    ],
)
def test_a_bad_text_is_refused(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ir.ParseError, match="line ") as caught:
        ir.parse(TEXT.replace(old, new, 1))
    assert message in str(caught.value)


def test_placements_stand_in_the_text_and_replicated_prints_nothing() -> None:
    placed = TEXT.replace("w: f32[6, 8] =", "w: f32[6, 8] @ shard(0) =").replace(
        "z: f32[T, 6] =", "z: f32[T, 6] @ partial ="
    )
    assert ir.dump(ir.parse(placed)) == placed
    assert ir.dump(ir.parse(TEXT.replace("w: f32[6, 8] =", "w: f32[6, 8] @ replicated ="))) == TEXT


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("y: f32[T, 6] =", "y: f32[T, 7] =", "stated type f32[T, 7], computed type f32[T, 6]"),
        ("y: f32[T, 6] =", "y: bf16[T, 6] =", "stated type bf16[T, 6]"),
        ("w: f32[6, 8]", "w: f32[6, 9]", "does not take these arguments"),
        ("c: bf16[T, 3] =", "c: bf16[Q, 3] =", "the dim Q is not declared"),
    ],
)
def test_verify_shows_the_line_and_its_neighbours(old: str, new: str, message: str) -> None:
    with pytest.raises(ir.VerificationError) as caught:
        ir.verify(ir.parse(TEXT.replace(old, new, 1)))
    assert message in str(caught.value)
    assert "--> " in str(caught.value)
    assert len(str(caught.value).splitlines()) >= 4


def test_verify_refuses_a_torn_kernel() -> None:
    graph = ir.parse(TEXT)
    nodes = {node.name: node for node in graph.calls()}
    nodes["b"].meta["region"] = nodes["n"].meta["region"]
    with pytest.raises(ir.VerificationError, match="torn apart"):
        ir.verify(graph)


sizes = st.builds(
    Dim.build,
    st.dictionaries(st.sampled_from(["T", "S", "rows"]), st.integers(-5, 5), max_size=3),
    st.integers(-99, 99),
)


@given(sizes)
def test_sizes_round_trip(size: Dim | int) -> None:
    assert parse_size(str(size)) == size


@given(st.lists(sizes, max_size=4))
def test_types_round_trip(shape: list[Dim | int]) -> None:
    kind = TensorType("f32", tuple(shape))
    names = {name for size in shape if isinstance(size, Dim) for name, _ in size.terms}
    dims = "".join(f", {name}: dim(1, 9)" for name in sorted(names))
    text = f"def f(x: {kind}{', *' + dims if dims else ''}):\n    return x\n"
    assert ir.dump(ir.parse(text)) == text
