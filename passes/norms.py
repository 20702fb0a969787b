"""Rules for norms: RMS norm, layer norm, and residual + norm."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import is_constant, type_of
from ..ir.ops import op_name
from .names import aten, nn
from .rule import Reject, rule

_ROOT_MEAN_SQUARE = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    p: f32[T, 8] = aten.pow.Tensor_Scalar(x, 2)
    m: f32[T, 1] = aten.mean.dim(p, [{dim}], True)
    e: f32[T, 1] = aten.add.Tensor(m, 1e-06)
    r: f32[T, 1] = aten.rsqrt(e)
    n: f32[T, 8] = aten.mul.Tensor(x, r)
    return {result}
"""


@rule
class FuseRMSNorm:
    """``x * rsqrt(mean(x**2) + eps)`` is an RMS norm without a scale."""

    def before(x, eps: float):
        return aten.mul.Tensor(
            x, aten.rsqrt(aten.add.Tensor(aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True), eps))
        )

    def after(x, eps):
        return nn.rms_norm(x, None, eps)

    examples = [
        (
            _ROOT_MEAN_SQUARE.format(dim=-1, result="n"),
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-06)  # FuseRMSNorm
    return n
""",
        ),
        (_ROOT_MEAN_SQUARE.format(dim=-1, result="(n, r)"), "rejected: r is also used by output"),
        (
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    p: f32[T, 8] = aten.pow.Tensor_Scalar(x, 3)
    m: f32[T, 1] = aten.mean.dim(p, [-1], True)
    e: f32[T, 1] = aten.add.Tensor(m, 1e-06)
    r: f32[T, 1] = aten.rsqrt(e)
    n: f32[T, 8] = aten.mul.Tensor(x, r)
    return n
""",
            "unchanged",
        ),
    ]


@rule
class FuseNormScale:
    """A norm without a scale takes the weight vector that its result is multiplied by."""

    def before(x, scale, eps: float):
        return aten.mul.Tensor(nn.rms_norm(x, None, eps), scale)

    def after(x, scale, eps):
        return nn.rms_norm(x, scale, eps)

    def when(m):
        if not is_constant(m["scale"]):
            raise Reject(f"{m['scale'].name} is no weight")
        if type_of(m["scale"]).shape != type_of(m["x"]).shape[-1:]:
            raise Reject(f"{m['scale'].name} is no vector over the last dim")

    examples = [
        (
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-06)
    w: f32[8] = weight("w")
    y: f32[T, 8] = aten.mul.Tensor(w, n)
    return y
""",
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    w: f32[8] = weight("w")
    y: f32[T, 8] = nn.rms_norm(x, w, 1e-06)  # FuseNormScale
    return y
""",
        ),
        (
            """\
def f(x: f32[T, 8], g: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-06)
    y: f32[T, 8] = aten.mul.Tensor(n, g)
    return y
""",
            "rejected: g is no weight",
        ),
    ]


@rule
class FuseTorchRMSNorm:
    """``torch.nn.RMSNorm`` under our name."""

    def before(x, shape: list, scale: object, eps: float):
        return aten.rms_norm(x, shape, scale, eps)

    def after(x, shape, scale, eps):
        return nn.rms_norm(x, scale, eps)

    def when(m):
        if list(m["shape"]) != [type_of(m["x"]).shape[-1]]:
            raise Reject("it normalizes over more than the last dim")

    examples = [
        (
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = aten.rms_norm(x, [8], None, 1e-05)
    return n
""",
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    n: f32[T, 8] = nn.rms_norm(x, None, 1e-05)  # FuseTorchRMSNorm
    return n
""",
        ),
        (
            """\
def f(x: f32[T, 4, 8], *, T: dim(1, 64)):
    n: f32[T, 4, 8] = aten.rms_norm(x, [4, 8], None, 1e-05)
    return n
""",
            "rejected: it normalizes over more than the last dim",
        ),
    ]


@rule
class FuseLayerNorm:
    """``torch.nn.LayerNorm`` under our name."""

    def before(x, shape: list, scale: object, bias: object, eps: float):
        return aten.layer_norm(x, shape, scale, bias, eps)

    def after(x, shape, scale, bias, eps):
        return nn.layer_norm(x, scale, bias, eps)

    def when(m):
        if list(m["shape"]) != [type_of(m["x"]).shape[-1]]:
            raise Reject("it normalizes over more than the last dim")

    examples = [
        (
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    w: f32[8] = weight("w")
    b: f32[8] = weight("b")
    n: f32[T, 8] = aten.layer_norm(x, [8], w, b)
    return n
""",
            """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    w: f32[8] = weight("w")
    b: f32[8] = weight("b")
    n: f32[T, 8] = nn.layer_norm(x, w, b, 1e-05)  # FuseLayerNorm
    return n
""",
        ),
        (
            """\
def f(x: f32[T, 4, 8], *, T: dim(1, 64)):
    n: f32[T, 4, 8] = aten.layer_norm(x, [4, 8])
    return n
""",
            "rejected: it normalizes over more than the last dim",
        ),
    ]


@rule
class FuseWrittenLayerNorm:
    """A layer norm written out: subtract the mean, divide by the standard deviation, multiply by a weight vector."""

    def before(x, scale, eps: float):
        centred = aten.sub.Tensor(x, aten.mean.dim(x, [-1], True))
        variance = aten.mean.dim(
            aten.pow.Tensor_Scalar(aten.sub.Tensor(x, aten.mean.dim(x, [-1], True)), 2), [-1], True
        )
        return aten.mul.Tensor(scale, aten.mul.Tensor(centred, aten.rsqrt(aten.add.Tensor(variance, eps))))

    def after(x, scale, eps):
        return nn.layer_norm(x, scale, None, eps)

    def when(m):
        if type_of(m["scale"]).shape != type_of(m["x"]).shape[-1:]:
            raise Reject(f"{m['scale'].name} is no vector over the last dim")

    examples = [
        (
            f"""\
def f(x: f32[T, 8], w: f32[{scale}], *, T: dim(1, 64)):
    m: f32[T, 1] = aten.mean.dim(x, [-1], True)
    c: f32[T, 8] = aten.sub.Tensor(x, m)
    s: f32[T, 8] = aten.pow.Tensor_Scalar(c, 2)
    v: f32[T, 1] = aten.mean.dim(s, [-1], True)
    e: f32[T, 1] = aten.add.Tensor(v, 1e-05)
    r: f32[T, 1] = aten.rsqrt(e)
    n: f32[T, 8] = aten.mul.Tensor(c, r)
    y: f32[T, 8] = aten.mul.Tensor(w, n)
    return y
""",
            outcome,
        )
        for scale, outcome in [
            (
                "8",
                """\
def f(x: f32[T, 8], w: f32[8], *, T: dim(1, 64)):
    y: f32[T, 8] = nn.layer_norm(x, w, None, 1e-05)  # FuseWrittenLayerNorm
    return y
""",
            ),
            ("T, 8", "rejected: w is no vector over the last dim"),
        ]
    ]


def made_by_linear(value: Node) -> bool:
    """Whether a value is a projection's result, perhaps with pointwise work on it."""
    while value.op == "call_function":
        name = op_name(value.target)
        if name in ("aten.linear", "nn.grouped_linear"):
            return name == "aten.linear"
        if name not in ("aten.reshape", "aten.to.dtype", "aten.mul.Tensor", "aten.add.Tensor") or not isinstance(
            value.args[0], Node
        ):
            return False
        value = value.args[0]
    return False


@rule
class FuseAddRMSNorm:
    """Residual + norm in one go, where the addition is not done by a projection's kernel anyway."""

    def before(x, residual, scale: object, eps: float):
        total = aten.add.Tensor(x, residual)
        return total, nn.rms_norm(total, scale, eps)

    def after(x, residual, scale, eps):
        both = nn.add_rms_norm(x, residual, scale, eps)
        return both[0], both[1]

    def when(m):
        if type_of(m["x"]) != type_of(m["residual"]):
            raise Reject("x and residual differ in type")
        for name in ("x", "residual"):
            if made_by_linear(m[name]):
                raise Reject(f"the addition is done by the kernel of the projection that makes {m[name].name}")

    examples = [
        (
            """\
def f(x: f32[T, 8], y: f32[T, 8], *, T: dim(1, 64)):
    s: f32[T, 8] = aten.add.Tensor(x, y)
    n: f32[T, 8] = nn.rms_norm(s, None, 1e-05)
    return (s, n)
""",
            """\
def f(x: f32[T, 8], y: f32[T, 8], *, T: dim(1, 64)):
    add_rms_norm: (f32[T, 8], f32[T, 8]) = nn.add_rms_norm(x, y, None, 1e-05)
    s: f32[T, 8] = add_rms_norm[0]  # FuseAddRMSNorm
    n: f32[T, 8] = add_rms_norm[1]  # FuseAddRMSNorm
    return (s, n)
""",
        ),
        (
            """\
def f(h: f32[T, 6], y: f32[T, 8], *, T: dim(1, 64)):
    w: f32[8, 6] = weight("w")
    x: f32[T, 8] = aten.linear(h, w)
    s: f32[T, 8] = aten.add.Tensor(y, x)
    n: f32[T, 8] = nn.rms_norm(s, None, 1e-05)
    return (s, n)
""",
            "rejected: the addition is done by the kernel of the projection that makes x",
        ),
    ]
