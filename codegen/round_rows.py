"""Whole rows rounded to codes of a byte, each with a factor of its own."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import scheme_of
from .tile import Position, Tile
from .weights import as_numbers, code_type


def store_codes(tile: Tile, output: Node, at: Position) -> None:
    """Print how whole rows are rounded and written: codes, and the factor of each row."""
    source, how, writer = output.args[0], scheme_of(type_of(output).dtype), tile.writer
    depth = type_of(output).shape[-1]
    assert isinstance(source, Node) and isinstance(depth, int) and how is not None
    row, column = at.coords
    x = tile.value(source, at)
    if len(output.args) > 3:
        divisors = output.args[3]
        assert isinstance(divisors, Node)
        columns = tile.value(divisors, at.at((column,)))
        x = writer.assign("smoothed", f"tl.div_rn({x}, {columns} + tl.zeros_like({x}))")
    most = writer.assign("most", f"tl.max(tl.where({at.mask}, tl.abs({x}), 0.0), 1)[:, None]")
    steps = f"tl.full({most}.shape, {how.largest}, tl.float32)"
    factor = writer.assign("factor", f"tl.where({most} > 0, tl.div_rn({most}, {steps}), 1.0)")
    codes = writer.assign("codes", f"code({x}, {factor}, {how.largest}, {not how.floats})")
    kind, size = code_type(how), how.row_bytes(depth)
    where, begin = f"{output.name}_ptr + {row} * {size}", how.factors_at(depth)
    bits = f"{codes}.to({kind}).to(tl.uint8, bitcast=True)"
    writer.line(f"tl.store({where} + {column}, {bits}, mask={at.mask})")
    place = f"{as_numbers(output, 'float32')} + {row} * {size // 4} + {begin // 4}"
    writer.line(f"tl.store({place}, {factor}, mask={at.rows})")
