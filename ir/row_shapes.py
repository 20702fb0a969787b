"""Where the rows are after operators that only move values: reshapes, transposes, repeats; and after our own operators."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from .graph import node_inputs
from .row_rules import Known, Mixes, Rows, along, argument, one, row_rule, shape_of
from .types import Dim


def _factor(size: Any) -> int:
    """The ``k`` of a size ``k*T``."""
    if not isinstance(size, Dim) or size.offset or len(size.terms) != 1:
        raise Mixes(f"a dim of size {size} is no whole number of rows")
    return size.terms[0][1]


@row_rule("reshape")
def _reshape(node: Node, known: Known) -> Rows:
    """A row-major reshape keeps the rows if what stands before them stays before them and what follows follows."""
    rows = one(node, known)
    before, after = shape_of(node.args[0]), shape_of(node)
    ahead = math.prod(before[: rows.axis]) * rows.outer
    places = [place for place, size in enumerate(after) if isinstance(size, Dim)]
    if len(places) != 1:
        raise Mixes("it folds tokens into several dims")
    place = places[0]
    outer, rest = divmod(ahead, math.prod(after[:place]))
    if rest or _factor(after[place]) % max(1, outer):
        raise Mixes("it folds tokens into another dim")
    return Rows(place - len(after), outer)


@row_rule("transpose", "swapaxes")
def _transpose(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    arguments: list[Any] = list(node.args)
    first, second = arguments[1:3]
    swapped = {first: second, second: first}
    return Rows(swapped.get(rows.axis, rows.axis), rows.outer)


@row_rule("permute")
def _permute(node: Node, known: Known) -> Rows:
    rows, dims = one(node, known), node.args[1]
    rank = len(dims)  # type: ignore[arg-type]
    places = [item if item < 0 else item - rank for item in dims]  # type: ignore[union-attr, operator]
    return Rows(places.index(rows.axis) - rank, rows.outer)


@row_rule("unsqueeze", "stack")
def _unsqueeze(node: Node, known: Known) -> Rows:
    rows, dim = one(node, known), argument(node, "dim")
    return Rows(rows.axis - (dim >= rows.axis), rows.outer)


@row_rule("squeeze")
def _squeeze(node: Node, known: Known) -> Rows:
    """Only dims of size 1 vanish, which the row of tokens never is."""
    rows, before = one(node, known), shape_of(node.args[0])
    gone = argument(node, "dim")
    dims = range(-len(before), 0) if gone is None else gone if isinstance(gone, (list, tuple)) else [gone]
    if rows.axis in dims and gone is not None:
        raise Mixes("it drops the row of tokens")
    return Rows(rows.axis + sum(before[dim] == 1 and dim > rows.axis for dim in dims), rows.outer)


@row_rule("expand")
def _expand(node: Node, known: Known) -> Rows | None:
    rows = known[node.args[0]]  # type: ignore[index]
    if rows is not None:
        return rows
    after = shape_of(node)
    axes = [place - len(after) for place, size in enumerate(after) if isinstance(size, Dim)]
    return Rows(axes[0]) if axes else None


@row_rule("repeat")
def _repeat(node: Node, known: Known) -> Rows | None:
    rows, times = known[node.args[0]], node.args[1]  # type: ignore[index]
    if rows is None:
        if any(isinstance(size, Dim) for size in shape_of(node)):
            raise Mixes("it makes rows that depend on how many tokens there are")
        return None
    if any(isinstance(item, Dim) for item in times):  # type: ignore[union-attr]
        raise Mixes("it repeats values once for each token")
    count: Any = times[rows.axis]  # type: ignore[index]
    return Rows(rows.axis, rows.outer * int(count))


@row_rule("repeat_interleave")
def _repeat_interleave(node: Node, known: Known) -> Rows:
    if not isinstance(node.args[1], int) or argument(node, "dim") is None:
        raise Mixes("it repeats tokens")
    return one(node, known)


@row_rule("view_as_complex")
def _view_as_complex(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    return Rows(rows.axis + 1, rows.outer)


@row_rule("view_as_real")
def _view_as_real(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    return Rows(rows.axis - 1, rows.outer)


@row_rule("pad", "constant_pad_nd")
def _pad(node: Node, known: Known) -> Rows:
    rows, widths = one(node, known), list(node.args[1])  # type: ignore[arg-type]
    along(rows, [-1 - place // 2 for place, width in enumerate(widths) if width])
    if argument(node, "mode", "constant") != "constant":
        raise Mixes("it pads with other values of the row")
    return rows


@row_rule("nn.attention")
def _attention(node: Node, known: Known) -> Rows:
    q, k, v, *rest = node_inputs(node.args)
    if any(known[item] != Rows(-3) for item in (q, k, v)) or any(known[item] is not None for item in rest):
        raise Mixes("its queries, keys and values are not one row for each token")
    return Rows(-3)


@row_rule("nn.grouped_linear")
def _grouped_linear(node: Node, known: Known) -> Rows:
    x, ids, *weights = node_inputs(node.args)
    expected = Rows(-2) if len(shape_of(x)) == 2 else Rows(-3)
    if known[x] != expected or known[ids] != Rows(-2) or any(known[item] is not None for item in weights):
        raise Mixes("its tokens and the experts they go to are not one row for each token")
    return Rows(-3)
