"""Fragments of random graphs: each reads the residual stream and returns the next one, in spellings of real models.

The first option of every choice is what Hugging Face models write most; others are rarer spellings, and near misses that
a pass must leave alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from random_attention import attention
from random_builder import Builder, Choices, T, last, linear, residual, shape_of
from random_norms import norm
from torch.fx import Node

VOCABULARY = 7

Fragment = Callable[[Builder, Choices, Node], Node]


def embedding(b: Builder, c: Choices) -> Node:
    """Embedded tokens, perhaps with embedded positions."""
    b.shared["embedding"] = table = b.weight(c, VOCABULARY, b.width)
    h = b("embedding", table, b.tokens)
    if c.chance(30):
        h = b("add.Tensor", h, b("embedding", b.weight(c, 64, b.width), b.positions))
    return h


def head(b: Builder, c: Choices, h: Node) -> object:
    """The final norm and the logits as ``[T, vocabulary]``; rarely with another value beside them."""
    if c.chance(50):
        h = norm(b, c, h)
    tied = c.chance(30)
    table = b.shared["embedding"] if tied else b.weight(c, c.of(VOCABULARY, 1, 97), b.width)
    y = linear(b, c, h, last_in(table), table)
    if c.chance(20):
        y = b("mul.Tensor", b("tanh", b("div.Tensor", y, 3.0)), 3.0)
    if c.chance(15):
        y = b("softmax.int", y, -1)
    beside = c.of(*b.stream) if b.stream and c.chance(10) else None
    if len(b.lead) == 2:
        y = b("select.int", y, -3, 0)
    return (y, beside) if beside is not None else y


def last_in(table: Node) -> int:
    size = shape_of(table)[0]
    assert isinstance(size, int)
    return size


def tanh_gelu(b: Builder, c: Choices, x: Node) -> Node:
    """GELU by its tanh approximation, written out as in gpt2."""
    half = b("mul.Tensor", x, 0.5)
    cubic = b("mul.Tensor", b("pow.Tensor_Scalar", x, 3.0), c.of(0.044715, 0.044715, 0.05))
    bell = b("tanh", b("mul.Tensor", b.commuted(c, "add.Tensor", x, cubic), 0.7978845608028654))
    if c.chance(10):
        half = b("add.Tensor", half, bell)
    return b.commuted(c, "mul.Tensor", half, b("add.Tensor", bell, 1.0))


def activation(b: Builder, c: Choices, x: Node) -> Node:
    match c.of("silu", "silu", "gelu", "tanh", "written", "relu", "sigmoid"):
        case "tanh":
            return b("gelu", x, approximate="tanh")
        case "written":
            return tanh_gelu(b, c, x)
        case name:
            return b(name, x)


def mlp(b: Builder, c: Choices, h: Node) -> Node:
    """A gated MLP: separate or joint projections, of the same or of other rows, perhaps of the same weight."""
    x = norm(b, c, h) if c.chance(60) else h
    width = c.of(8, 1, 3, 5, 12, 97)
    form = c.of("separate", "separate", "joint", "plain", "other rows", "same weight", "column")
    if form == "joint":
        both = linear(b, c, x, 2 * width)
        gate, up = b("slice.Tensor", both, -1, 0, width), b("slice.Tensor", both, -1, width, 2 * width)
    elif form == "plain":
        return residual(b, c, h, activation(b, c, linear(b, c, x, width)))
    elif form == "same weight":
        shared = b.weight(c, width, last(x))
        gate = b("linear", x, shared)
        up = b("linear", x, shared) if c.chance(50) else b("linear", c.of(h, *b.stream), shared)
    else:
        gate = linear(b, c, x, width)
        up = linear(b, c, c.of(*b.stream) if form == "other rows" else x, 1 if form == "column" else width)
    a = activation(b, c, gate)
    if c.chance(15):
        a = casts(b, c, a)
    y = b.commuted(c, "mul.Tensor", a, up)
    if c.chance(15):
        y = b("add.Tensor", y, c.of(a, gate))
    return residual(b, c, h, linear(b, c, y, b.width))


def casts(b: Builder, c: Choices, x: Node) -> Node:
    """There and back: through a wider or narrower type, or through one that cuts off the fraction."""
    through = c.of("f64", "f32", "bf16" if b.dtype == "bf16" else "f64", "i64")
    if through == "i64" and c.chance(40):
        x = b("mul.Tensor", x, 3.0)
    return b.cast(b.cast(x, through), b.dtype)


def pointwise(b: Builder, c: Choices, x: Node) -> Node:
    """Some work on single elements."""
    match c.of("tanh", "casts", "twice", "clamp", "where", "self", "scale", "expand"):
        case "tanh":
            return b("tanh", x)
        case "casts":
            return casts(b, c, x)
        case "twice":  # a common subexpression
            return b("mul.Tensor", b("sigmoid", x), b("sigmoid", x))
        case "clamp":
            return b("clamp", x, c.of(-0.5, -1.0), 0.75)
        case "where":
            return b("where.self", b("gt.Scalar", x, 0.0), x, b("mul.Tensor", x, 0.1))
        case "self":
            return b(c.of("add.Tensor", "mul.Tensor", "sub.Tensor", "maximum"), x, c.of(x, b("neg", x)))
        case "scale":
            return b.commuted(c, "mul.Tensor", x, b.weight(c, *c.of((last(x),), (1,), (1, last(x)))))
        case _:
            column = b("mean.dim", x, [-1], True)
            return b("sub.Tensor", x, b("expand", column, shape_of(x)))


def elementwise(b: Builder, c: Choices, h: Node) -> Node:
    x = pointwise(b, c, h)
    return residual(b, c, h, x) if c.of(True, False) else b.like(x, h)


def dead(b: Builder, c: Choices, h: Node) -> Node:
    """Work whose result nobody reads."""
    x = pointwise(b, c, c.of(h, *b.stream))
    if c.chance(50):
        norm(b, c, x)
    return h


def normed(b: Builder, c: Choices, h: Node) -> Node:
    """A norm of the stream, or of a sum whose parts are read elsewhere too."""
    total = b.commuted(c, "add.Tensor", h, c.of(h, *b.stream)) if c.chance(50) else h
    n = norm(b, c, total)
    if c.chance(20):
        n = b("add.Tensor", n, norm(b, c, total))
    return residual(b, c, total, n) if c.chance(60) else b.like(n, h)


def heads(b: Builder, c: Choices, h: Node) -> Node:
    """Work on ``[heads, T, d]``, with the transposes around it that models write."""
    count = c.of(*[n for n in range(1, b.width + 1) if b.width % n == 0])
    size = b.width // count
    x = b("reshape", h, [*b.lead, count, size])
    turned = c.chance(80)
    if turned:
        x = b("transpose.int", x, -3, -2)
    for _ in range(c.of(1, 2, 3)):
        x = b.like(_on_heads(b, c, x, h, count, size, turned), x)
    if turned:
        x = b("transpose.int", x, -3, -2)
    y = b("reshape", x, [*b.lead, b.width])
    return residual(b, c, h, y) if c.of(True, False) else b.like(y, h)


def _on_heads(b: Builder, c: Choices, x: Node, h: Node, count: int, size: int, turned: bool) -> Node:
    match c.of("pointwise", "norm", "per head", "table", "halves", "softmax", "other", "back and forth", "per row"):
        case "norm":
            return norm(b, c, x, on_heads=True)
        case "per head":
            shape = (count, 1, 1) if turned else (count, 1)
            return b.commuted(c, "mul.Tensor", x, b.weight(c, *shape))
        case "table":
            table = b("linear", b("tanh", h), b.weight(c, size, b.width))
            if c.chance(30) and turned:
                return b.commuted(c, "mul.Tensor", x, table)
            return b.commuted(c, "mul.Tensor", x, b("unsqueeze", table, -3 if turned else -2))
        case "halves":
            cut = size // 2
            return b("cat", [b("neg", b("slice.Tensor", x, -1, cut, size)), b("slice.Tensor", x, -1, 0, cut)], -1)
        case "softmax":
            return b("softmax.int", x, -1)
        case "other":
            other = b("reshape", b("tanh", h), [*b.lead, count, size])
            other = b("transpose.int", other, -3, -2) if turned else other
            return b.commuted(c, c.of("add.Tensor", "mul.Tensor"), x, other)
        case "back and forth":
            return b("transpose.int", b("exp", b("neg", b("abs", b("transpose.int", x, -3, -2)))), -3, -2)
        case "per row":
            column = b("mean.dim", x, [-1], True)
            return b("div.Tensor", x, b("add.Tensor", b("abs", column), 1.0))
        case _:
            return pointwise(b, c, x)


def outer(b: Builder, c: Choices, h: Node) -> Node:
    """A matrix product over one column, or over two."""
    depth, wide = c.of(1, 1, 2), c.of(3, 1, 5)
    column = b("unsqueeze", h, -1)
    if depth == 2:
        column = b("cat", [column, b("tanh", column)], -1)
    product = b("matmul", column, b.weight(c, depth, wide))
    return residual(b, c, h, b("sum.dim_IntList", product, [-1]))


def of_groups(b: Builder, c: Choices, scores: Node, count: int) -> Node:
    """Scores of which those of all groups but a few are masked; none are where there is one group, or where all are taken."""
    groups = c.of(1, count)
    taken = max(1, groups - c.of(0, 0, 1))
    parts = [*b.lead, groups, count // groups]
    best = b("amax", b("reshape", scores, parts), [-1])
    ids = b.item(b("topk", best, taken, -1), 1)
    chosen = b("unsqueeze", b("scatter.value", b("zeros_like", best), -1, ids, 1), -1)
    mask = b("to.dtype", b("reshape", b("expand", chosen, parts), [*b.lead, count]), torch.bool)
    return b("masked_fill.Scalar", scores, b("bitwise_not", mask), 0.0)


def experts(b: Builder, c: Choices, h: Node) -> Node:
    """A router and the experts it chooses, as one grouped projection."""
    count, chosen = c.of(4, 3), c.of(2, 1)
    scores = b("softmax.int", b("linear", b.cast(h, "f32"), b.weight(c, count, b.width, dtype="f32")), -1)
    if c.chance(40):
        scores = of_groups(b, c, scores, count)
    best = b("topk", scores, chosen, -1)
    weights, ids = b.item(best, 0), b.item(best, 1)
    if c.chance(50):
        weights = b("div.Tensor", weights, b("sum.dim_IntList", weights, [-1], True))
    rows, width = [b("reshape", value, [T, last(value)]) for value in (h, ids, weights)], b.width
    y = b("nn.grouped_linear", rows[0], rows[1], b.weight(c, count, width, width))
    y = b("mul.Tensor", y, b("unsqueeze", b.like(rows[2], h), -1))
    return residual(b, c, h, b("reshape", b("sum.dim_IntList", y, [-2]), [*b.lead, width]))


FRAGMENTS: dict[str, Fragment] = {
    "norm": normed,
    "mlp": mlp,
    "attention": attention,
    "heads": heads,
    "elementwise": elementwise,
    "dead": dead,
    "outer": outer,
    "experts": experts,
}
# How often each is drawn.
KINDS: tuple[str, ...] = (
    *["norm"] * 3,
    *["mlp"] * 3,
    *["attention"] * 4,
    *["heads"] * 2,
    *["elementwise", "dead", "outer", "experts"],
)
