"""Rules for outer products: position times frequency, written as a matrix product, is one multiplication."""

from __future__ import annotations

from ..ir.graph import type_of
from .names import aten
from .rule import Reject, rule

_MATMUL = """\
def f(a: f32[1, 4, {depth}], b: f32[1, {depth}, T], *, T: dim(1, 64)):
    y: f32[1, 4, T] = aten.matmul(a, b)
    return y
"""


@rule
class OuterFromMatmul:
    """A matrix product over a single column is an outer product: one multiplication for each element."""

    def before(a, b):
        return aten.matmul(a, b)

    def after(a, b):
        return aten.mul.Tensor(a, b)

    def when(m):
        if type_of(m["a"]).rank < 2 or type_of(m["b"]).rank < 2 or type_of(m["a"]).shape[-1] != 1:
            raise Reject("it sums over more than one column")

    examples = [
        (
            _MATMUL.format(depth=1),
            """\
def f(a: f32[1, 4, 1], b: f32[1, 1, T], *, T: dim(1, 64)):
    y: f32[1, 4, T] = aten.mul.Tensor(a, b)  # OuterFromMatmul
    return y
""",
        ),
        (_MATMUL.format(depth=2), "rejected: it sums over more than one column"),
    ]


_OUTER = """\
def f(a: f32[{shape}], b: f32[1, T], *, T: dim(1, 64)):
    m: f32[{wide}, T] = aten.mul.Tensor(a, b)
    y: f32[T, {wide}] = aten.transpose.int(m, -2, -1)
    return y
"""


@rule
class OuterByRows:
    """An outer product that is transposed afterwards is made in rows of tokens from the start."""

    def before(column, row):
        return aten.transpose.int(aten.mul.Tensor(column, row), -2, -1)

    def after(column, row):
        return aten.mul.Tensor(aten.transpose.int(row, -2, -1), aten.transpose.int(column, -2, -1))

    def when(m):
        column, row = type_of(m["column"]), type_of(m["row"])
        if (column.rank, row.rank) != (2, 2) or column.shape[1] != 1 or row.shape[0] != 1:
            raise Reject("the factors are not a column and a row")

    examples = [
        (
            _OUTER.format(shape="4, 1", wide="4"),
            """\
def f(a: f32[4, 1], b: f32[1, T], *, T: dim(1, 64)):
    transpose: f32[T, 1] = aten.transpose.int(b, -2, -1)
    transpose_1: f32[1, 4] = aten.transpose.int(a, -2, -1)
    y: f32[T, 4] = aten.mul.Tensor(transpose, transpose_1)  # OuterByRows
    return y
""",
        ),
        (_OUTER.format(shape="4, T", wide="4"), "rejected: the factors are not a column and a row"),
    ]


@rule
class ColumnFromRow:
    """A vector made a row and then transposed is a column."""

    def before(x):
        return aten.transpose.int(aten.unsqueeze(x, -2), -2, -1)

    def after(x):
        return aten.unsqueeze(x, -1)

    def when(m):
        if type_of(m["x"]).rank != 1:
            raise Reject("it is a matrix")

    examples = [
        (
            """\
def f(x: i64[T], *, T: dim(1, 64)):
    r: i64[1, T] = aten.unsqueeze(x, -2)
    c: f32[1, T] = aten.to.dtype(r, f32)
    y: f32[T, 1] = aten.transpose.int(c, -2, -1)
    return y
""",
            """\
def f(x: i64[T], *, T: dim(1, 64)):
    unsqueeze: i64[T, 1] = aten.unsqueeze(x, -1)
    y: f32[T, 1] = aten.to.dtype(unsqueeze, f32)  # ColumnFromRow
    return y
""",
        ),
        (
            """\
def f(x: i64[T, 4], *, T: dim(1, 64)):
    r: i64[T, 1, 4] = aten.unsqueeze(x, -2)
    y: i64[T, 4, 1] = aten.transpose.int(r, -2, -1)
    return y
""",
            "rejected: it is a matrix",
        ),
    ]
