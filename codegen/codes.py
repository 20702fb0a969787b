"""A product of two matrices in codes of a byte: what it reads beside the weight, and what the library makes of it."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from .columns import Plan
from .matmul_tile import MatmulTile
from .weights import as_numbers, code_type, in_codes, scheme


def row_codes(tile: MatmulTile, layout: Plan) -> str:
    """Print the codes of the rows in the loop of the product; returns their name."""
    rows, how = _rows(layout), scheme(layout)
    at = tile.at_k
    where = f"{as_numbers(rows, code_type(how)[3:])} + {at.coords[0]} * {how.row_bytes(layout.depth)} + {at.coords[1]}"
    return tile.writer.assign("codes", f"tl.load({where}, mask={at.mask}, other=0.0)")


def in_fours(layout: Plan) -> bool:
    """Whether one row is multiplied four codes at a time: they are whole numbers, of a byte each."""
    return in_codes(layout) and not scheme(layout).floats


def row_fours(layout: Plan) -> str:
    """The expression of one row at ``word``, in words of four codes."""
    return _fours(_rows(layout), layout, "row")


def weight_fours(layout: Plan, more: str) -> list[str]:
    """The same of a tile of the weight, for each lane. What lies past the end of its rows is zero."""
    columns = [f"(n + {offset})[:, None]" if offset else "n[:, None]" for offset in layout.offsets]
    return [_fours(layout.weight, layout, column, "ok[:, None] & ", more) for column in columns]


def _fours(value: Node, layout: Plan, row: str, ok: str = "", more: str = "") -> str:
    how, depth = scheme(layout), layout.depth
    where = f"{as_numbers(value, 'int32')} + {row} * {how.row_bytes(depth) // 4} + word[None, :]"
    return f"tl.load({where}, mask={ok}(word < {how.factors_at(depth) // 4})[None, :], other=0{more})"


def print_row_factors(tile: MatmulTile, layout: Plan) -> None:
    """Print the factor of each row's sums, where the rows are in codes."""
    if not in_codes(layout):
        return
    rows, how = _rows(layout), scheme(layout)
    first, size = how.factors_at(layout.depth), how.row_bytes(layout.depth)
    guard = f", mask={tile.row_mask}, other=0.0" if tile.row_mask else ""
    place = f"{as_numbers(rows, 'float32')} + row * {size // 4} + {first // 4}"
    tile.writer.line(f"row_factors = tl.load({place}{guard})")


def sums_type(layout: Plan) -> str:
    """The type of the sums, as Triton text: products of whole codes are summed exactly."""
    return "tl.int32" if in_fours(layout) else "tl.float32"


def dot_options(layout: Plan) -> str:
    """How the small matrix products are summed, as Triton text: whole codes exactly, other operands with all their digits."""
    return "out_dtype=tl.int32" if sums_type(layout) == "tl.int32" else 'input_precision="ieee"'


def scaled_product(layout: Plan) -> str:
    """The function of a file that has the library multiply codes, as text; empty if the library does not take them."""
    if not in_codes(layout) or not scheme(layout).floats or type_of(layout.anchor).dtype != "bf16":
        return ""
    how, depth, width = scheme(layout), layout.depth, type_of(layout.anchor).shape[1]
    if depth % 16 or not isinstance(width, int) or width % 16:
        return ""
    first = how.factors_at(depth)
    return f'''\
def parted(rows):
    """The codes of packed rows, and their factors."""
    return rows[:, :{depth}].view(torch.float8_e4m3fn), rows[:, {first}:{first + 4}].contiguous().view(torch.float32)


def scaled_product(x, weight, bias, out):
    """The product of the library: of codes, each row and each column with its factor."""
    (codes, by_row), (columns, by_column) = parted(x), parted(weight)
    torch._scaled_mm(
        codes, columns.t(), by_row, by_column.t(), bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


'''


def _rows(layout: Plan) -> Node:
    rows = layout.anchor.args[0]
    assert isinstance(rows, Node)
    return rows
