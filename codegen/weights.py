"""How the kernels of a matmul read a tile of its weight: as it is, or from the bytes of a quantisation scheme."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import scheme_of
from ..ir.types import TensorType
from .columns import Plan

_TRITON = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}


def is_rounded(layout: Plan) -> bool:
    """Whether the weight is quantised."""
    return scheme_of(type_of(layout.weight).dtype) is not None


def rows_type(layout: Plan) -> TensorType:
    """The type of the rows that are multiplied with the weight."""
    rows = layout.anchor.args[0]
    assert isinstance(rows, Node)
    return type_of(rows)


def element(layout: Plan) -> str:
    """The type of the operands of a small matrix product, as Triton text."""
    return _TRITON[rows_type(layout).dtype] if is_rounded(layout) else f"{layout.weight.name}_ptr.dtype.element_ty"


def weight_tile(layout: Plan, column: str, ok: str, across: str, along: str, more: str = "") -> str:
    """The expression of a tile. ``column`` and ``ok`` are the columns of the result (rows of the weight) and their mask;
    ``across`` and ``along`` are the shapes that they and ``k`` get. A quantised one is read as fp32."""
    pointer, depth = f"{layout.weight.name}_ptr", layout.depth
    scheme = scheme_of(type_of(layout.weight).dtype)
    if scheme is None:
        where = f"{pointer} + {column}{across} * {depth} + k{along}"
        return f"tl.load({where}, mask={ok}{across} & (k < {depth}){along}, other=0{more})"
    row = f"{pointer} + {column}{across} * {scheme.row_bytes(depth)}"
    place = f"{row}, {ok}{across}, k{along}, (k < {depth}){along}, {scheme.factors_at(depth)}"
    if scheme.bits == 8:
        return f"int8_weights({place})"
    zeros = scheme.zeros_at(depth) if scheme.zeros else 0
    return f"int4_weights({place}, {scheme.group}, {zeros})"
