"""FoldNormScales: where the scale of a norm goes into weights, and where it stays."""

from __future__ import annotations

import pytest
import torch

from fuseline.ir.dump import dump
from fuseline.ir.interpret import interpret
from fuseline.ir.parse import parse
from fuseline.ir.verify import verify
from fuseline.passes import PASSES, PassReport

HEAD = "def block(x: {kind}[T, 8], *, T: dim(1, 64)):\n"
WEIGHTS = """\
    s: {kind}[8] = weight("s")
    w: {kind}[6, 8] = weight("w")
    b: {kind}[6] = weight("b")
"""
PLAIN = """\
    n: {kind}[T, 8] = nn.rms_norm(x, s, 1e-05)
    y: {kind}[T, 6] = aten.linear(n, w, b)
    return y
"""


def run(body: str, kind: str = "f32") -> tuple[str, PassReport]:
    graph, report = parse((HEAD + WEIGHTS + body).format(kind=kind)), PassReport("FoldNormScales")
    made = PASSES["FoldNormScales"](graph, report)
    verify(made)
    return dump(made), report


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_scale_goes_into_the_weight(kind: str) -> None:
    text, report = run(PLAIN, kind)
    assert report.fused == ["n"]
    assert f"w_scaled: {kind}[6, 8] = aten.mul.Tensor(w, s)" in text
    assert "nn.rms_norm(x, None, 1e-05)" in text and "aten.linear(n, w_scaled, b)" in text


def test_the_numbers_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    x, s, w, b = (torch.randn(size, generator=generator) for size in ((5, 8), (8,), (6, 8), (6,)))
    found = [
        interpret(parse(text), {"x": x}, {"s": s, "w": w, "b": b})
        for text in ((HEAD + WEIGHTS + PLAIN).format(kind="f32"), run(PLAIN)[0])
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


BESIDE = """\
    n: f32[T, 8] = nn.rms_norm(x, s, 1e-05)
    y: f32[T, 6] = aten.linear(n, w, b)
    z: f32[T, 8] = aten.sigmoid(n)
    return [y, z]
"""
SHARED = """\
    n: f32[T, 8] = nn.rms_norm(x, s, 1e-05)
    y: f32[T, 6] = aten.linear(n, w, b)
    z: f32[T, 6] = aten.linear(x, w, b)
    return [y, z]
"""
WIDE = """\
    v: f32[8] = weight("v")
    n: bf16[T, 8] = nn.rms_norm(x, v, 1e-05)
    y: bf16[T, 6] = aten.linear(n, w, b)
    return y
"""


TIED = """\
    ids: i64[3] = const([0, 2, 5], i64)
    t: f32[6, 8] = weight("t")
    e: f32[3, 8] = aten.embedding(t, ids)
    n: f32[T, 8] = nn.rms_norm(x, s, 1e-05)
    y: f32[T, 6] = aten.linear(n, w, b)
    return [y, e]
"""


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        (TIED, "f32", "w may be tied to an embedding, which would be held twice"),
        (BESIDE, "f32", "z reads it beside a projection"),
        (SHARED, "f32", "w has another reader"),
        (WIDE, "bf16", "scale, weight and rows differ in type"),
        (PLAIN, "f16", "products of small f16 weights would lose digits"),
    ],
)
def test_where_it_stays_and_why(body: str, kind: str, why: str) -> None:
    text, report = run(body, kind)
    assert [item.why for item in report.refused] == [why] and not report.fused
    assert text == dump(parse((HEAD + WEIGHTS + body).format(kind=kind)))


def test_a_norm_of_heads_is_no_site() -> None:
    body = "    n: f32[T, 8] = nn.rms_norm(x, s, 1e-05)\n    z: f32[T, 8] = aten.sigmoid(n)\n    return z\n"
    _, report = run(body)
    assert report.found == 0
