"""Rules for rotary embedding: the spellings found in models become ``nn.rope`` on rows ``[T, heads, head_dim]``."""

from __future__ import annotations

from ..ir.graph import type_of
from .matcher import Match
from .names import aten, nn
from .rule import Reject, rule

_HALF = """\
def f(x: f32[T, 3, 8], c: f32[T, 8], s: f32[T, 8], *, T: dim(1, 64)):
    cu: f32[T, 1, 8] = aten.unsqueeze(c, -2)
    a: f32[T, 3, 8] = aten.mul.Tensor(x, cu)
    low: f32[T, 3, {split}] = aten.slice.Tensor(x, -1, 0, {split})
    high: f32[T, 3, {rest}] = aten.slice.Tensor(x, -1, {split}, 8)
    neg: f32[T, 3, {rest}] = aten.neg(high)
    turned: f32[T, 3, 8] = aten.cat([neg, low], -1)
    su: f32[T, 1, 8] = aten.unsqueeze(s, -2)
    b: f32[T, 3, 8] = aten.mul.Tensor(turned, su)
    y: f32[T, 3, 8] = aten.add.Tensor(a, b)
    return y
"""


def _check(m: Match) -> None:
    width = type_of(m["x"]).shape[-1]
    if type_of(m["cos"]).shape[-1] != width or type_of(m["sin"]).shape[-1] != width:
        raise Reject("cos and sin are not as wide as x")
    if type_of(m["x"]).rank != 3 or type_of(m["cos"]).rank != 2:
        raise Reject("x is not laid out as [T, heads, head_dim]")


@rule(shared_inner=True)
class FuseRope:
    """``x * cos + rotate_half(x) * sin``: feature ``i`` is turned with feature ``i + D/2``."""

    def before(x, cos, sin, half: int, width: int):
        turned = aten.cat([aten.neg(aten.slice.Tensor(x, -1, half, width)), aten.slice.Tensor(x, -1, 0, half)], -1)
        return aten.add.Tensor(
            aten.mul.Tensor(x, aten.unsqueeze(cos, -2)), aten.mul.Tensor(turned, aten.unsqueeze(sin, -2))
        )

    def after(x, cos, sin, half, width):
        return nn.rope(x, cos, sin, "half")

    def when(m):
        _check(m)
        if 2 * m["half"] != m["width"]:
            raise Reject("the halves differ in width")

    examples = [
        (
            _HALF.format(split=4, rest=4),
            """\
def f(x: f32[T, 3, 8], c: f32[T, 8], s: f32[T, 8], *, T: dim(1, 64)):
    y: f32[T, 3, 8] = nn.rope(x, c, s, "half")  # FuseRope
    return y
""",
        ),
        (_HALF.format(split=2, rest=6), "rejected: the halves differ in width"),
        (_HALF.format(split=4, rest=4).replace("aten.neg(high)", "aten.abs(high)"), "unchanged"),
    ]


@rule(shared_inner=True)
class FuseInterleavedRope:
    """``x * cos + rotate_pairs(x) * sin``: feature ``2i`` is turned with feature ``2i + 1``."""

    def before(x, cos, sin, width: int, shape: list):
        odd = aten.slice.Tensor(x, -1, 1, width, 2)
        even = aten.slice.Tensor(x, -1, 0, width, 2)
        turned = aten.reshape(aten.stack([aten.neg(odd), even], -1), shape)
        return aten.add.Tensor(
            aten.mul.Tensor(x, aten.unsqueeze(cos, -2)), aten.mul.Tensor(turned, aten.unsqueeze(sin, -2))
        )

    def after(x, cos, sin, width, shape):
        return nn.rope(x, cos, sin, "interleaved")

    def when(m):
        _check(m)
        if tuple(m["shape"]) != type_of(m["x"]).shape:
            raise Reject("the pairs are not folded back into the last dim")

    examples = [
        (
            f"""\
def f(x: f32[T, 3, 8], c: f32[T, {width}], s: f32[T, {width}], *, T: dim(1, 64)):
    cu: f32[T, 1, {width}] = aten.unsqueeze(c, -2)
    a: f32[T, 3, 8] = aten.mul.Tensor(x, cu)
    even: f32[T, 3, 4] = aten.slice.Tensor(x, -1, 0, 8, 2)
    odd: f32[T, 3, 4] = aten.slice.Tensor(x, -1, 1, 8, 2)
    neg: f32[T, 3, 4] = aten.neg(odd)
    pairs: f32[T, 3, 4, 2] = aten.stack([neg, even], -1)
    turned: f32[T, 3, 8] = aten.reshape(pairs, [T, 3, 8])
    su: f32[T, 1, {width}] = aten.unsqueeze(s, -2)
    b: f32[T, 3, 8] = aten.mul.Tensor(turned, su)
    y: f32[T, 3, 8] = aten.add.Tensor(a, b)
    return y
""",
            outcome,
        )
        for width, outcome in [
            (
                8,
                """\
def f(x: f32[T, 3, 8], c: f32[T, 8], s: f32[T, 8], *, T: dim(1, 64)):
    y: f32[T, 3, 8] = nn.rope(x, c, s, "interleaved")  # FuseInterleavedRope
    return y
""",
            ),
            (1, "rejected: cos and sin are not as wide as x"),
        ]
    ]


_SPLIT = """\
def f(x: f32[T, 3, 8], c: f32[T, 4], s: f32[T, 4], *, T: dim(1, 64)):
    low: f32[T, 3, 4] = aten.slice.Tensor(x, -1, 0, 4)
    high: f32[T, 3, 4] = aten.slice.Tensor(x, -1, 4, {end})
    cu: f32[T, 1, 4] = aten.unsqueeze(c, -2)
    su: f32[T, 1, 4] = aten.unsqueeze(s, -2)
    a: f32[T, 3, 4] = aten.mul.Tensor(low, cu)
    b: f32[T, 3, 4] = aten.mul.Tensor(high, su)
    first: f32[T, 3, 4] = aten.sub.Tensor(a, b)
    d: f32[T, 3, 4] = aten.mul.Tensor(high, cu)
    e: f32[T, 3, 4] = aten.mul.Tensor(low, su)
    second: f32[T, 3, 4] = aten.add.Tensor(d, e)
    y: f32[T, 3, 8] = aten.cat({parts}, -1)
    return y
"""


@rule(shared_inner=True)
class FuseSplitRope:
    """Rotary embedding written on the two halves, with ``cos`` and ``sin`` of half the width."""

    def before(x, cos, sin, half: int, width: int):
        low = aten.slice.Tensor(x, -1, 0, half)
        high = aten.slice.Tensor(x, -1, half, width)
        c = aten.unsqueeze(cos, -2)
        s = aten.unsqueeze(sin, -2)
        first = aten.sub.Tensor(aten.mul.Tensor(low, c), aten.mul.Tensor(high, s))
        second = aten.add.Tensor(aten.mul.Tensor(high, c), aten.mul.Tensor(low, s))
        return aten.cat([first, second], -1)

    def after(x, cos, sin, half, width):
        return nn.rope(x, aten.cat([cos, cos], -1), aten.cat([sin, sin], -1), "half")

    def when(m):
        if type_of(m["x"]).rank != 3 or type_of(m["x"]).shape[-1] != m["width"]:
            raise Reject("x is wider than the part that is turned")
        if 2 * m["half"] != m["width"] or type_of(m["cos"]).shape[-1] != m["half"]:
            raise Reject("the halves differ in width")

    examples = [
        (
            _SPLIT.format(end=8, parts="[first, second]"),
            """\
def f(x: f32[T, 3, 8], c: f32[T, 4], s: f32[T, 4], *, T: dim(1, 64)):
    cat: f32[T, 8] = aten.cat([c, c], -1)
    cat_1: f32[T, 8] = aten.cat([s, s], -1)
    y: f32[T, 3, 8] = nn.rope(x, cat, cat_1, "half")  # FuseSplitRope
    return y
""",
        ),
        (_SPLIT.format(end=8, parts="[second, first]"), "unchanged"),
        (
            _SPLIT.format(end=8, parts="[first, second]").replace("x: f32[T, 3, 8],", "x: f32[T, 3, 9],"),
            "rejected: x is wider than the part that is turned",
        ),
    ]


_PARTIAL = """\
def f(x: f32[T, 3, 12], c: f32[T, 8], s: f32[T, 8], *, T: dim(1, 64)):
    part: f32[T, 3, 8] = aten.slice.Tensor(x, -1, 0, 8)
    turned: f32[T, 3, 8] = nn.rope(part, c, s, "half")
    rest: f32[T, 3, {width}] = aten.slice.Tensor(x, -1, {start}, 12)
    y: f32[T, 3, {total}] = aten.cat([turned, rest], -1)
    return y
"""


@rule(shared_inner=True)
class FusePartialRope:
    """Rotating the first features and passing the others on is one rotary embedding of the whole head."""

    def before(x, cos, sin, width: int, start: int, end: int, pairing: str):
        turned = nn.rope(aten.slice.Tensor(x, -1, 0, width), cos, sin, pairing)
        return aten.cat([turned, aten.slice.Tensor(x, -1, start, end)], -1)

    def after(x, cos, sin, width, start, end, pairing):
        return nn.rope(x, cos, sin, pairing)

    def when(m):
        if m["width"] != m["start"] or m["end"] != type_of(m["x"]).shape[-1]:
            raise Reject("the parts do not make up the whole head")

    examples = [
        (
            _PARTIAL.format(start=8, width=4, total=12),
            """\
def f(x: f32[T, 3, 12], c: f32[T, 8], s: f32[T, 8], *, T: dim(1, 64)):
    y: f32[T, 3, 12] = nn.rope(x, c, s, "half")  # FusePartialRope
    return y
""",
        ),
        (_PARTIAL.format(start=6, width=6, total=14), "rejected: the parts do not make up the whole head"),
    ]
