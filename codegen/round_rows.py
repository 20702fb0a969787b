"""Whole rows rounded to codes of a byte, each with a factor of its own; and what ranks with parts of rows tell each other."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import scheme_of
from .coordinates import flat_index
from .tile import Position, Tile
from .weights import as_numbers


def row_absmax(tile: Tile, node: Node, at: Position) -> str:
    """The expression of ``nn.absmax``: the largest magnitude of each row that is at hand."""
    x = _over(tile, tile.value(node.all_input_nodes[0], at), node.args[2:3], at)
    return _largest(x, at)


def store_codes(tile: Tile, output: Node, at: Position) -> None:
    """Print how rows are rounded and written: codes, and the factor of each row."""
    source, how, writer = output.args[0], scheme_of(type_of(output).dtype), tile.writer
    depth = type_of(output).shape[-1]
    assert isinstance(source, Node) and isinstance(depth, int) and how is not None
    *lead, column = at.coords
    row = flat_index(lead, type_of(output).shape[:-1])
    row = row if row.isidentifier() else writer.assign("flat", row)
    x = _over(tile, tile.value(source, at), output.args[3:4], at)
    most = writer.assign("most", _given(tile, output.args[4], at) if len(output.args) > 4 else _largest(x, at))
    steps = f"tl.full({most}.shape, {how.largest}, tl.float32)"
    factor = writer.assign("factor", f"tl.where({most} > 0, tl.div_rn({most}, {steps}), 1.0)")
    codes = f"code_byte({x}, {factor}, {how.largest}, {not how.floats}, PDL)"
    size, begin = how.row_bytes(depth), how.factors_at(depth)
    writer.line(f"tl.store({output.name}_ptr + {row} * {size} + {column}, {codes}, mask={at.mask})")
    place = f"{as_numbers(output, 'float32')} + {row} * {size // 4} + {begin // 4}"
    writer.line(f"tl.store({place}, {factor}, mask={at.rows})")


def _over(tile: Tile, x: str, divisors: tuple[object, ...], at: Position) -> str:
    """Rows over a vector, if there is one."""
    if not divisors or not isinstance(divisors[0], Node):
        return x
    columns = tile.value(divisors[0], at.at(at.coords[-1:]))
    return tile.writer.assign("smoothed", f"tl.div_rn({x}, {columns} + tl.zeros_like({x}))")


def _largest(x: str, at: Position) -> str:
    return f"tl.max(tl.where({at.mask}, tl.abs({x}), 0.0), 1)[:, None]"


def _given(tile: Tile, absmax: object, at: Position) -> str:
    """The largest magnitude of rows of which this may be a part, from those of all parts."""
    assert isinstance(absmax, Node)
    parts = type_of(absmax).shape[-1]
    assert isinstance(parts, int)
    text = ""
    for part in range(parts):
        found = tile.value(absmax, at.at((*at.coords[:-1], str(part)), ""))
        text = f"tl.maximum({text}, {found})" if text else found
    return text
