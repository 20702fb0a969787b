"""Norms of random graphs: written out as models do, torch's own, and near misses."""

from __future__ import annotations

from random_builder import Builder, Choices, dtype_of, last, shape_of
from torch.fx import Node


def norm(b: Builder, c: Choices, x: Node, on_heads: bool = False) -> Node:
    """Some norm of ``x`` over its last dim, in the element type of ``x``; ``on_heads`` allows some over its last two."""
    match c.of("rms", "rms", "rms", "layer", "torch rms", "torch layer", "ours"):
        case "rms":
            return scaled(b, c, written_rms(b, c, x, on_heads), x)
        case "layer":
            return written_layer(b, c, x)
        case "torch rms":
            weight = c.of(b.weight(c, last(x)), None)
            eps = c.of((1e-5,), (1e-2,), ())
            heads = shape_of(x)[-2]
            if on_heads and isinstance(heads, int) and c.chance(30):
                return b("rms_norm", x, [heads, last(x)], None, *eps)
            n = b("rms_norm", x, [last(x)], weight, *eps)
            return scaled(b, c, n, x) if weight is None else n
        case "torch layer":
            return torch_layer(b, c, x, on_heads)
        case _:
            return scaled(b, c, b("nn.rms_norm", x, c.of(None, b.weight(c, last(x))), 1e-5), x)


def written_rms(b: Builder, c: Choices, x: Node, on_heads: bool) -> Node:
    """``x * rsqrt(mean(x**2) + eps)``, perhaps computed in a wider type; the result is as wide."""
    wide = b.cast(x, "f32") if c.of(True, dtype_of(x) == "bf16") and dtype_of(x) == "bf16" else x
    if c.chance(15):
        wide = b.cast(wide, "f64")
    axis = c.of(-1, -1, -1, -2) if on_heads else -1
    match c.of("square", "square", "float", "product", "fourth"):
        case "square":
            power = b("pow.Tensor_Scalar", wide, 2)
        case "float":
            power = b("pow.Tensor_Scalar", wide, 2.0)
        case "product":
            power = b("mul.Tensor", wide, wide)
        case _:
            power = b("pow.Tensor_Scalar", wide, 4)
    mean = b("mean.dim", power, [axis], True)
    shifted = b("add.Tensor", mean, c.of(1e-6, 1e-6, 1e-5, 0.25, 1))
    match c.of("rsqrt", "rsqrt", "rsqrt", "power"):
        case "rsqrt":
            r = b("rsqrt", shifted)
        case _:
            r = b("pow.Tensor_Scalar", shifted, -0.5)
    source = b("tanh", wide) if c.chance(8) else x if c.chance(15) else wide
    n = b.commuted(c, "mul.Tensor", source, r)
    if c.chance(10):
        n = b("add.Tensor", n, r)
    return n


def scaled(b: Builder, c: Choices, n: Node, x: Node) -> Node:
    """``n`` times a weight, before or after it is rounded to the type of ``x``; or times something else."""
    early = c.of(True, False)
    if early:
        n = b.like(n, x)
    width = last(x)
    match c.of("weight", "weight", "none", "one more", "vector", "row", "one", "rows"):
        case "weight":
            n = b.commuted(c, "mul.Tensor", b.weight(c, width), n)
        case "one more":  # gemma
            scale = b.like(b.weight(c, width), n)
            n = b.commuted(c, "mul.Tensor", n, b("add.Tensor", scale, 1.0))
        case "vector":
            n = b.commuted(c, "mul.Tensor", n, b("tanh", b.weight(c, width)))
        case "row":
            n = b.commuted(c, "mul.Tensor", n, b.weight(c, 1, width))
        case "one":
            n = b.commuted(c, "mul.Tensor", n, b.weight(c, 1))
        case "rows":
            n = b.commuted(c, "mul.Tensor", n, b("sigmoid", x))
        case _:
            pass
    if c.chance(10):
        n = b("mul.Tensor", n, c.of(1.0, 0.5))
    return b.like(n, x)


def written_layer(b: Builder, c: Choices, x: Node) -> Node:
    """``(x - mean) * rsqrt(var + eps) * weight``."""
    mean = b("mean.dim", x, [-1], True)
    centred = b("sub.Tensor", x, mean)
    match c.of("same", "again", "other", "uncentred"):
        case "again":
            spread = b("sub.Tensor", x, mean)
        case "other":
            spread = b("sub.Tensor", x, b("mean.dim", x, [-1], True))
        case "uncentred":
            spread = x
        case _:
            spread = centred
    variance = b("mean.dim", b("pow.Tensor_Scalar", spread, 2), [-1], True)
    r = b("rsqrt", b("add.Tensor", variance, c.of(1e-5, 1e-3)))
    n = b.commuted(c, "mul.Tensor", centred, r)
    match c.of("weight", "weight", "rows", "none"):
        case "weight":
            n = b.commuted(c, "mul.Tensor", b.weight(c, last(x)), n)
        case "rows":
            n = b.commuted(c, "mul.Tensor", b("sigmoid", x), n)
        case _:
            pass
    if c.chance(30):
        n = b("add.Tensor", n, b.weight(c, last(x)))
    if c.chance(10):
        n = b("add.Tensor", n, c.of(centred, r))
    return b.like(n, x)


def torch_layer(b: Builder, c: Choices, x: Node, on_heads: bool) -> Node:
    """``torch.nn.LayerNorm``, over the last dim or over heads and their dim together."""
    shape = shape_of(x)[-2:] if on_heads and c.chance(50) and isinstance(shape_of(x)[-2], int) else [last(x)]
    sizes = [size for size in shape if isinstance(size, int)]
    match c.of("both", "weight", "none", "bias"):
        case "both":
            return b("layer_norm", x, sizes, b.weight(c, *sizes), b.weight(c, *sizes))
        case "weight":
            return b("layer_norm", x, sizes, b.weight(c, *sizes))
        case "bias":
            return b("layer_norm", x, sizes, None, b.weight(c, *sizes), 1e-3)
        case _:
            return b("layer_norm", x, sizes)
