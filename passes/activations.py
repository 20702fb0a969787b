"""Rules for MLPs: plain and gated activations, and projections written as ``addmm``."""

from __future__ import annotations

from ..ir.graph import is_constant, type_of
from .matcher import Match
from .names import aten, nn
from .rule import Reject, rule

_ADDMM = """\
def f(x: f32[T, 6]{more}, *, T: dim(1, 64)):
    b: f32[8] = weight("b")
{weight}    y: f32[T, 8] = aten.addmm(b, x, w)
    return y
"""


@rule
class LinearFromAddmm:
    """``bias + x @ w`` with ``w`` stored ``[in, out]`` is a linear layer on the transposed weight."""

    def before(bias, x, w):
        return aten.addmm(bias, x, w)

    def after(bias, x, w):
        return aten.linear(x, aten.transpose.int(w, -2, -1), bias)

    def when(m):
        if not is_constant(m["w"]):
            raise Reject(f"{m['w'].name} is no weight")
        if type_of(m["bias"]).rank != 1:
            raise Reject("the bias is no vector")

    examples = [
        (
            _ADDMM.format(more="", weight='    w: f32[6, 8] = weight("w")\n'),
            """\
def f(x: f32[T, 6], *, T: dim(1, 64)):
    b: f32[8] = weight("b")
    w: f32[6, 8] = weight("w")
    transpose: f32[8, 6] = aten.transpose.int(w, -2, -1)
    y: f32[T, 8] = aten.linear(x, transpose, b)  # LinearFromAddmm
    return y
""",
        ),
        (_ADDMM.format(more=", w: f32[6, 8]", weight=""), "rejected: w is no weight"),
    ]


_TANH_GELU = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    h: f32[T, 8] = aten.mul.Tensor(x, 0.5)
    c: f32[T, 8] = aten.pow.Tensor_Scalar(x, 3.0)
    k: f32[T, 8] = aten.mul.Tensor(c, {factor})
    a: f32[T, 8] = aten.add.Tensor(x, k)
    b: f32[T, 8] = aten.mul.Tensor(a, 0.7978845608028654)
    t: f32[T, 8] = aten.tanh(b)
    o: f32[T, 8] = aten.add.Tensor(t, 1.0)
    y: f32[T, 8] = aten.mul.Tensor(h, o)
    return {result}
"""


@rule
class FuseTanhGelu:
    """GELU by its tanh approximation, written out (Hendrycks & Gimpel 2016)."""

    def before(x):
        cubic = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715))
        bell = aten.add.Tensor(aten.tanh(aten.mul.Tensor(cubic, 0.7978845608028654)), 1.0)
        return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), bell)

    def after(x):
        return aten.gelu(x, approximate="tanh")

    examples = [
        (
            _TANH_GELU.format(factor=0.044715, result="y"),
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    y: f32[T, 8] = aten.gelu(x, approximate="tanh")  # FuseTanhGelu
    return y
""",
        ),
        (_TANH_GELU.format(factor=0.05, result="y"), "unchanged"),
        (_TANH_GELU.format(factor=0.044715, result="(y, t)"), "rejected: t is also used by output"),
    ]


def _same_type(m: Match) -> None:
    if type_of(m["gate"]) != type_of(m["up"]):
        raise Reject("gate and up differ in type")


def _gated(call: str, result: str = "y", up: str = "8") -> str:
    return f"""\
def f(g: f32[T, 8], u: f32[T, {up}], *, T: dim(1, 64)):
    a: f32[T, 8] = {call}
    y: f32[T, 8] = aten.mul.Tensor(u, a)
    return {result}
"""


def _fused(call: str) -> str:
    return f"""\
def f(g: f32[T, 8], u: f32[T, 8], *, T: dim(1, 64)):
    y: f32[T, 8] = {call}
    return y
"""


@rule
class FuseSiluMul:
    """``silu(gate) * up`` reads each input once."""

    def before(gate, up):
        return aten.mul.Tensor(aten.silu.default(gate), up)

    def after(gate, up):
        return nn.silu_mul.default(gate, up)

    when = _same_type
    examples = [
        (_gated("aten.silu(g)"), _fused("nn.silu_mul(g, u)  # FuseSiluMul")),
        (_gated("aten.silu(g)", up="1"), "rejected: gate and up differ in type"),
        (_gated("aten.silu(g)", result="(y, a)"), "rejected: a is also used by output"),
        (_gated("aten.relu(g)"), "unchanged"),
        (
            """\
def f(g: f32[T, 8], u: f32[T, 8], *, T: dim(1, 64)):
    a: f32[T, 8] = aten.silu(g)
    i: i64[T, 8] = aten.to.dtype(a, i64)
    w: f32[T, 8] = aten.to.dtype(i, f32)
    y: f32[T, 8] = aten.mul.Tensor(u, w)
    return y
""",
            "unchanged",
        ),
    ]


@rule
class FuseGeluMul:
    """``gelu(gate) * up`` reads each input once."""

    def before(gate, up):
        return aten.mul.Tensor(aten.gelu(gate), up)

    def after(gate, up):
        return nn.gelu_mul(gate, up)

    when = _same_type
    examples = [
        (_gated("aten.gelu(g)"), _fused("nn.gelu_mul(g, u)  # FuseGeluMul")),
        (_gated('aten.gelu(g, approximate="tanh")'), "unchanged"),
        (_gated("aten.gelu(g)", up="1"), "rejected: gate and up differ in type"),
    ]


@rule
class FuseTanhGeluMul:
    """``gelu(gate) * up`` by the tanh approximation reads each input once."""

    def before(gate, up):
        return aten.mul.Tensor(aten.gelu(gate, approximate="tanh"), up)

    def after(gate, up):
        return nn.gelu_mul(gate, up, "tanh")

    when = _same_type
    examples = [
        (
            _gated('aten.gelu(g, approximate="tanh")'),
            _fused('nn.gelu_mul(g, u, "tanh")  # FuseTanhGeluMul'),
        ),
        (_gated("aten.gelu(g)"), "unchanged"),
        (_gated('aten.gelu(g, approximate="tanh")', up="1"), "rejected: gate and up differ in type"),
    ]
