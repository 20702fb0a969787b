"""Projections on packed weights: the same numbers, and no weight is held twice. If this fails, the CPU path is wrong or fat."""

from __future__ import annotations

import pytest
import torch

from fuseline.ir import parse
from fuseline.ir.loop import Loop
from fuseline.ir.quantized import dequantize, quantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.runtime.constants import fold_constants
from fuseline.runtime.packed import pack_linears
from fuseline.runtime.rounded import rounded_product

GRAPH = """\
def f(tokens: i64[T], x: f32[T, 300], *, T: dim(1, 64)):
    table: f32[301, 300] = weight("table")
    small: f32[5, 300] = weight("small")
    w: f32[257, 300] = weight("w")
    b: f32[257] = weight("b")
    v: f32[257, 300] = weight("v")
    e: f32[T, 300] = aten.embedding(table, tokens)
    a: f32[T, 300] = aten.add.Tensor(x, e)
    y: f32[T, 257] = aten.linear(a, w, b)
    s: f32[T, 5] = aten.linear(a, small)
    h: f32[()] = aten.sum(a)
    c: f32[257] = aten.mul.Tensor(b, h)
    q: f32[T, 257] = aten.linear(a, v, c)
    z: f32[T, 301] = aten.linear(a, table)
    return (y, s, q, z)
"""


def test_packed_projections_are_projections() -> None:
    graph = parse(GRAPH)
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (301, 300), "small": (5, 300), "w": (257, 300), "v": (257, 300), "b": (257,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    loop = Loop.plain(graph)
    constants = fold_constants(loop, weights, torch.device("cpu"), {})
    linears, size = pack_linears(loop, constants)
    assert {node.name for node in linears} == {"y", "z"}
    # The embedding still reads its table row by row; the packed projection was the only reader of w.
    assert {node.name for node in constants} == {"table", "small", "v", "b"}
    assert size == 4 * 300 * (257 + 301)
    for tokens in (1, 2, 7, 61):
        x = torch.randn(tokens, 300, generator=generator)
        for node, name, bias in (
            (graph_node(linears, "y"), "w", weights["b"]),
            (graph_node(linears, "z"), "table", None),
        ):
            expected = torch.nn.functional.linear(
                x.double(), weights[name].double(), None if bias is None else bias.double()
            )
            error = (linears[node][0](x).double() - expected).norm() / expected.norm()
            assert float(error) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8g64", "int4g64", "int4g32", "uint4g128", "uint4g32"])
def test_projections_of_rounded_weights(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are products with what the codes stand for, whatever number of rows is made at a time, in as many bytes."""
    monkeypatch.setattr("fuseline.runtime.rounded._AT_ONCE", 384 * 100)
    scheme = scheme_of(name)
    assert scheme is not None
    generator = torch.Generator().manual_seed(3)
    rows = quantize(torch.randn(257, 384, generator=generator), scheme)
    x, bias = torch.randn(7, 384, generator=generator).to(dtype), torch.randn(257, generator=generator).to(dtype)
    product = rounded_product(rows, scheme, 384)
    exact = x.double() @ dequantize(rows, TensorType(name, (257, 384)), torch.float32).double().t()
    for found, wanted in ((product(x, None, dtype), exact), (product(x[None], bias, dtype)[0], exact + bias.double())):
        assert found.dtype == dtype and found.shape == (7, 257)
        assert float((found.double() - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_rounded_weights_are_held_once() -> None:
    text = """\
def f(x: f32[T, 64], *, T: dim(1, 64)):
    w: f32[48, 64] = weight("w")
    q: int4g32[48, 64] = nn.quantize(w, "int4g32")
    y: f32[T, 48] = aten.linear(x, q)
    return (y,)
"""
    loop = Loop.plain(parse(text))
    constants = fold_constants(loop, {"w": torch.randn(48, 64)}, torch.device("cpu"), {})
    held = sum(value.nbytes for values in constants.values() for value in values)
    linears, size = pack_linears(loop, constants)
    assert [node.name for node in linears] == ["y"] and not constants and size == held == 48 * (32 + 8 + 8)


def graph_node(linears: dict, name: str):
    return next(node for node in linears if node.name == name)
