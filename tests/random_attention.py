"""Attention of random graphs: projections, rotary embedding in the spellings of models, and what may be shared."""

from __future__ import annotations

from typing import Any

from random_builder import Builder, Choices, last, linear, residual, shape_of
from random_norms import norm
from torch.fx import Node


def attention(b: Builder, c: Choices, h: Node) -> Node:
    """A layer of attention with its residual: grouped-query heads, separate or joint projections."""
    x = norm(b, c, h) if c.chance(60) else h
    kv_heads, group, size = c.of(2, 1, 3), c.of(1, 2, 3), c.of(8, 4, 6, 1, 3, 5)
    q_heads = kv_heads * group
    counts = (q_heads, kv_heads, kv_heads)
    match c.of("separate", "separate", "separate", "joint", "other rows", "same weight", "same value", "earlier"):
        case "joint":
            joint = linear(b, c, x, size * sum(counts))
            ends = [size * sum(counts[: place + 1]) for place in range(3)]
            rows = [b("slice.Tensor", joint, -1, end - size * count, end) for end, count in zip(ends, counts)]
        case "other rows":
            rows = [linear(b, c, c.of(x, *b.stream), size * count) for count in counts]
        case "same weight":
            rows = [linear(b, c, x, size * q_heads)]
            rows += [b("linear", x, w) for w in [b.weight(c, size * kv_heads, last(x))] for _ in range(2)]
        case "same value":
            key = linear(b, c, x, size * kv_heads)
            rows = [linear(b, c, x, size * q_heads), key, key]
        case _:
            rows = [linear(b, c, x, size * count) for count in counts]
    q, k, v = (b("reshape", row, [*b.lead, count, size]) for row, count in zip(rows, counts))
    if c.chance(20):
        q, k = (norm(b, c, value, on_heads=True) for value in (q, k))
    if ("kv", kv_heads, size) in b.shared and c.chance(40):  # later layers may read the keys of an earlier one
        k, v = b.shared["kv", kv_heads, size]
    turned = c.of(True, False)
    values = [b("transpose.int", item, -3, -2) if turned else item for item in (q, k, v)]
    if size % 2 == 0 and c.chance(75):
        style = draw_style(b, c, size)
        values[:2] = [rotated(b, c, item, style, turned) for item in values[:2]]
    if c.chance(10):
        values[0] = b("mul.Tensor", values[0], c.of(0.5, 2.0))
    q, k, v = (b("transpose.int", item, -3, -2) if turned else item for item in values)
    b.shared["kv", kv_heads, size] = (k, v)
    y = attend(b, c, q, k, v, q_heads, size)
    return residual(b, c, h, linear(b, c, b("reshape", y, [*b.lead, q_heads * size]), b.width))


def attend(b: Builder, c: Choices, q: Node, k: Node, v: Node, heads: int, size: int) -> Node:
    kind, window = c.of(("causal", 0), ("sliding", 3), ("chunked", 2))
    softcap = c.of(0.0, 0.0, 5.0)
    sinks = b.weight(c, heads) if c.chance(20) else None
    layer, b.layers = b.layers, b.layers + 1
    first: list[Any] = [layer, size**-0.5]
    if kind == "causal" and not softcap and sinks is None:
        return b("nn.attention", q, k, v, *first)
    if c.chance(25):
        named = {"kind": kind, "window": window, "softcap": softcap, "sinks": sinks}
        return b("nn.attention", q, k, v, *first, **named)
    return b("nn.attention", q, k, v, *first, kind, window, softcap, *([] if sinks is None else [sinks]))


def draw_style(b: Builder, c: Choices, size: int) -> dict[str, Any]:
    """How rotary embedding is spelled, the same for queries and keys, and its tables."""
    pairing = c.of("half", "half", "interleaved", "split")
    width = size - 2 if size > 2 and c.chance(25) else size
    key = ("tables", pairing, width)
    if key not in b.shared or c.chance(30):
        b.shared[key] = tables(b, c, pairing, width)
    wrong = c.of("", "uneven", "unsigned", "swapped") if c.chance(25) else ""
    return {"pairing": pairing, "width": width, "tables": b.shared[key], "wrong": wrong}


def tables(b: Builder, c: Choices, pairing: str, width: int) -> tuple[Node, Node]:
    """Cosines and sines ``[..., T, width]`` (half as wide for ``split``) of position times frequency."""
    half = width // 2
    match c.of("column", "matmul", "row"):
        case "column":
            places = b.cast(b("unsqueeze", b.positions, -1), "f32")
            angles = b.commuted(c, "mul.Tensor", places, b.weight(c, half, dtype="f32"))
        case "matmul":
            places = b.cast(b("unsqueeze", b.positions, -2), "f32")
            column = b("unsqueeze", b.weight(c, half, dtype="f32"), -1)
            if len(b.lead) == 2:
                column = b("unsqueeze", column, -3)
            angles = b("transpose.int", b("matmul", column, places), -2, -1)
        case _:
            places = b.cast(b("transpose.int", b("unsqueeze", b.positions, -2), -2, -1), "f32")
            angles = b("mul.Tensor", places, b.weight(c, half, dtype="f32"))
    if pairing == "half":
        angles = b("cat", [angles, angles], -1)
    elif pairing == "interleaved":
        pairs = b("stack", [angles, angles], -1)
        angles = b("reshape", pairs, [*b.lead, width])
    found = [b("cos", angles), b("sin", angles)]
    if c.of(True, False):
        found = [b("mul.Tensor", item, c.of(1.0, 1.25)) for item in found]
    if b.dtype != "f32" and c.chance(70):
        found = [b.cast(item, b.dtype) for item in found]
    return found[0], found[1]


def rotated(b: Builder, c: Choices, x: Node, style: dict[str, Any], turned: bool) -> Node:
    """Rotary embedding of ``[..., T, heads, d]``, or of ``[..., heads, T, d]`` if ``turned``."""
    width, size = style["width"], last(x)
    direct = style["pairing"] == "split" and c.of(True, False)
    part = b("slice.Tensor", x, -1, 0, width) if width < size and not direct else x
    cos, sin = (b("unsqueeze", item, -3 if turned else -2) for item in style["tables"])
    spell = {"half": _half, "interleaved": _interleaved, "split": _split}[style["pairing"]]
    y = b.like(spell(b, c, part, cos, sin, width, style["wrong"]), x)
    return b("cat", [y, b("slice.Tensor", x, -1, width, size)], -1) if width < size else y


def _half(b: Builder, c: Choices, x: Node, cos: Node, sin: Node, width: int, wrong: str) -> Node:
    cut = width // 2 - 1 if wrong == "uneven" else width // 2
    low, high = b("slice.Tensor", x, -1, 0, cut), b("slice.Tensor", x, -1, cut, width)
    other = b("abs" if wrong == "unsigned" else "neg", high)
    turned = b("cat", [low, other] if wrong == "swapped" else [other, low], -1)
    left = b.commuted(c, "mul.Tensor", x, cos)
    return b.commuted(c, "add.Tensor", left, b.commuted(c, "mul.Tensor", turned, sin))


def _interleaved(b: Builder, c: Choices, x: Node, cos: Node, sin: Node, width: int, wrong: str) -> Node:
    even, odd = b("slice.Tensor", x, -1, 0, width, 2), b("slice.Tensor", x, -1, 1, width, 2)
    other = b("abs" if wrong == "unsigned" else "neg", odd)
    pairs = b("stack", [even, other] if wrong == "swapped" else [other, even], -1)
    turned = b("reshape", pairs, shape_of(x))
    left = b.commuted(c, "mul.Tensor", x, cos)
    return b.commuted(c, "add.Tensor", left, b.commuted(c, "mul.Tensor", turned, sin))


def _split(b: Builder, c: Choices, x: Node, cos: Node, sin: Node, width: int, wrong: str) -> Node:
    low, high = b("slice.Tensor", x, -1, 0, width // 2), b("slice.Tensor", x, -1, width // 2, width)
    first = b("sub.Tensor", b.commuted(c, "mul.Tensor", low, cos), b.commuted(c, "mul.Tensor", high, sin))
    second = b.commuted(c, "add.Tensor", b.commuted(c, "mul.Tensor", high, cos), b.commuted(c, "mul.Tensor", low, sin))
    return b("cat", [second, first] if wrong == "swapped" else [first, second], -1)
