"""Coordinates through a reshape, against torch."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import random

import pytest
import torch

from fuseline.codegen.coordinates import through_view
from fuseline.ir.parse import parse


def shapes(seed: int) -> tuple[list[int], list[int]]:
    """Two ways to cut the same number of elements into dims, ones among them."""
    draw = random.Random(seed)
    factors = [draw.choice((2, 2, 3, 5)) for _ in range(draw.randint(1, 5))]

    def cut() -> list[int]:
        dims = [1]
        for factor in factors:
            if draw.random() < 0.5:
                dims.append(1)
            dims[-1] *= factor
        return dims if draw.random() < 0.5 or dims[0] != 1 or len(dims) == 1 else dims[1:]

    return cut(), cut()


_OPERATIONS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def value(tree: ast.expr, known: dict[str, int]) -> int:
    """The number that a printed coordinate is."""
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return known[name]
        case ast.BinOp(left=left, op=sign, right=right):
            return _OPERATIONS[type(sign)](value(left, known), value(right, known))
    raise AssertionError(f"no coordinate: {ast.unparse(tree)}")


def read(source: list[int], shape: list[int]) -> torch.Tensor:
    """The elements that the printed coordinates name, of a tensor that counts its elements."""
    text = f"def f(x: f32{source}):\n    y: f32{shape} = aten.reshape(x, {shape})\n    return y\n"
    (node,) = parse(text).calls()
    names = tuple(f"i{place}" for place in range(len(shape)))
    coords = through_view(node, names)
    assert coords is not None and len(coords) == len(source)
    values = torch.arange(math.prod(source)).reshape(source)
    trees = [ast.parse(text, mode="eval").body for text in coords]
    found = [
        values[tuple(value(tree, dict(zip(names, index))) for tree in trees)]
        for index in itertools.product(*map(range, shape))
    ]
    return torch.stack(found).reshape(shape)


@pytest.mark.parametrize("seed", range(40))
def test_a_reshape_reads_the_elements_it_names(seed: int) -> None:
    source, shape = shapes(seed)
    assert torch.equal(read(source, shape), torch.arange(math.prod(source)).reshape(shape))


def test_dims_that_stay_are_not_computed_anew() -> None:
    text = "def f(x: f32[T, 48, 5], *, T: dim(1, 9)):\n    y: f32[T, 6, 8, 5] = aten.reshape(x, [T, 6, 8, 5])\n    return y\n"
    (node,) = parse(text).calls()
    assert through_view(node, ("t", "h", "c", "d")) == ("t", "(h * 8 + c)", "d")
