"""How the kernels of a matmul read a tile of its weight: as it is, or from the bytes of a quantisation scheme."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import Scheme, scheme_of
from ..ir.types import TensorType
from .columns import Plan
from .packed_rows import PackedRows
from .writer import Writer

_TRITON = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}


def is_rounded(layout: Plan) -> bool:
    """Whether the weight is quantised and the rows are not: its words become numbers."""
    found = scheme_of(type_of(layout.weight).dtype)
    return found is not None and not found.dynamic


def in_codes(layout: Plan) -> bool:
    """Whether weight and rows are multiplied as they are held, in codes of a byte."""
    found = scheme_of(type_of(layout.weight).dtype)
    return found is not None and found.dynamic


def has_column_factors(layout: Plan) -> bool:
    """Whether each column's sums have a factor."""
    return in_codes(layout) or (is_rounded(layout) and not scheme(layout).group)


def rows_type(layout: Plan) -> TensorType:
    """The type of the rows that are multiplied with the weight."""
    rows = layout.anchor.args[0]
    assert isinstance(rows, Node)
    return type_of(rows)


def element(layout: Plan) -> str:
    """The type of the operands of a small matrix product, as Triton text."""
    if in_codes(layout):
        # The tensor cores sum products of E4M3 with less than 24 bits.
        exact = scheme(layout).floats and type_of(layout.anchor).dtype == "f32"
        return "tl.float16" if exact else code_type(scheme(layout))
    return _TRITON[rows_type(layout).dtype] if is_rounded(layout) else f"{layout.weight.name}_ptr.dtype.element_ty"


def code_type(how: Scheme) -> str:
    """The type of a code of a byte, as Triton text."""
    return "tl.float8e4nv" if how.floats else "tl.int8"


def scheme(layout: Plan) -> Scheme:
    """The scheme of a quantised weight."""
    found = scheme_of(type_of(layout.weight).dtype)
    assert found is not None
    return found


def plain_tile(layout: Plan, column: str, ok: str, across: str, along: str, more: str = "") -> str:
    """The expression of a tile of a weight that is not quantised, or of its codes. ``column`` and ``ok`` are the columns of
    the result (rows of the weight) and their mask; ``across`` and ``along`` are the shapes that they and ``k`` get."""
    mask = f"{ok}{across} & (k < {layout.depth}){along}"
    if in_codes(layout):
        how = scheme(layout)
        where = f"{as_numbers(layout.weight, code_type(how)[3:])} + {column}{across} * {row_length(layout)} + k{along}"
        cast = f".to({element(layout)})" if element(layout) != code_type(how) else ""
        return f"tl.load({where}, mask={mask}, other=0.0{more}){cast}"
    where = f"{layout.weight.name}_ptr + {column}{across} * {layout.depth} + k{along}"
    return f"tl.load({where}, mask={mask}, other=0{more})"


def row_length(layout: Plan) -> int:
    """From one row of a weight to the next, in its elements, or in bytes of codes."""
    return scheme(layout).row_bytes(layout.depth) if in_codes(layout) else layout.depth


def packed_rows(layout: Plan) -> PackedRows:
    """The rows of a quantised weight."""
    return PackedRows(f"{layout.weight.name}_ptr", scheme(layout), layout.depth)


def print_column_factors(writer: Writer, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print the factor of each column's sums, ``[1, columns]``, where the scheme has one for a whole row of the weight."""
    if not has_column_factors(layout):
        return
    for offset, name in zip(layout.offsets, accumulators):
        column = f"(n[None, :] + {offset})" if offset else "n[None, :]"
        packed_rows(layout).print_column_factors(writer, name, column, "n_ok")


def as_numbers(value: Node, kind: str) -> str:
    """The pointer to a value's bytes as one to numbers; what is known of its alignment, the cast forgets."""
    return f"tl.multiple_of({value.name}_ptr.to(tl.pointer_type(tl.{kind})), 16)"
