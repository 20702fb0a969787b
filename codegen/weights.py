"""How the kernels of a matmul read a tile of its weight: as it is, or from the bytes of a quantisation scheme."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import Scheme, scheme_of
from ..ir.types import TensorType
from .columns import Plan
from .writer import Writer

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


def packs_nibbles(layout: Plan) -> bool:
    """Whether a 16-bit word of the weight holds four codes."""
    scheme = scheme_of(type_of(layout.weight).dtype)
    return scheme is not None and scheme.bits == 4


def weight_tile(layout: Plan, column: str, ok: str, across: str, along: str, more: str = "") -> str:
    """The expression of a tile. ``column`` and ``ok`` are the columns of the result (rows of the weight) and their mask;
    ``across`` and ``along`` are the shapes that they and ``k`` get.

    Codes of 8 bits are read as they are: ``column_factors`` go to the sums. Codes of 4 bits become fp32.
    """
    pointer, depth = f"{layout.weight.name}_ptr", layout.depth
    scheme = scheme_of(type_of(layout.weight).dtype)
    length = scheme.row_bytes(depth) if scheme else depth
    if scheme and scheme.bits == 4:
        place = f"{ok}{across}, k{along}, (k < {depth}){along}"
        return f"int4_weights({pointer} + {column}{across} * {length}, {place}, {_layout_of_row(scheme, depth)})"
    load = f"tl.load({pointer} + {column}{across} * {length} + k{along}, mask={ok}{across} & (k < {depth}){along}, other=0{more})"
    return f"{load}.to(tl.int8, bitcast=True)" if scheme else load


def column_factors(layout: Plan, column: str) -> str:
    """The factor of each column's sums, ``[1, columns]``; empty if there is none."""
    scheme, depth = scheme_of(type_of(layout.weight).dtype), layout.depth
    if scheme is None or scheme.group:
        return ""
    where = f"{layout.weight.name}_ptr + {column} * {scheme.row_bytes(depth)} + {scheme.factors_at(depth)}"
    return f"tl.load(({where}).to(tl.pointer_type(tl.float32)), mask=n_ok, other=0)"


def print_words(writer: Writer, layout: Plan, name: str, column: str, ok: str, more: str = "") -> None:
    """Print the words of a tile, ``i16 [columns, BLOCK_K / 4]``, under that name."""
    scheme = scheme_of(type_of(layout.weight).dtype)
    assert scheme is not None
    row = f"{layout.weight.name}_ptr + {column}[:, None] * {scheme.row_bytes(layout.depth)}"
    mask = f"{ok}[:, None] & (word * 4 < {layout.depth})[None, :]"
    writer.line(f"{name} = tl.load(({row}).to(tl.pointer_type(tl.int16)) + word[None, :], mask={mask}, other=0{more})")


def nibble(layout: Plan, words: str, place: int) -> str:
    """One code of each word, fp32, without zero point and factor."""
    scheme = scheme_of(type_of(layout.weight).dtype)
    assert scheme is not None
    codes = f"(({words} >> {4 * place}) & 15)"
    return f"{codes}.to(tl.float32)" if scheme.zeros else f"(({codes} ^ 8) - 8).to(tl.float32)"


def group_values(layout: Plan, column: str, ok: str, block: str) -> tuple[str, str]:
    """The factors and zero points (empty if there are none) of groups, fp32, for the blocks of 32 codes in ``block``."""
    scheme, depth = scheme_of(type_of(layout.weight).dtype), layout.depth
    assert scheme is not None
    row = f"{layout.weight.name}_ptr + {column}[:, None] * {scheme.row_bytes(depth)}"
    group = f"({block} // {scheme.group // 32})[None, :]"
    mask = f"mask={ok}[:, None] & ({block} * 32 < {depth})[None, :], other=0"
    factors = f"tl.load(({row} + {scheme.factors_at(depth)}).to(tl.pointer_type(tl.float32)) + {group}, {mask})"
    zeros = f"tl.load({row} + {scheme.zeros_at(depth)} + {group}, {mask}).to(tl.float32)" if scheme.zeros else ""
    return factors, zeros


def _layout_of_row(scheme: Scheme, depth: int) -> str:
    return f"{scheme.factors_at(depth)}, {scheme.group}, {scheme.zeros_at(depth) if scheme.zeros else 0}"
