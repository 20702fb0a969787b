"""Where the rows are after operators that read by index: tables read by tokens, and columns picked from every row."""

from __future__ import annotations

from torch.fx import Node

from .graph import flat_types
from .row_rules import Known, Mixes, Rows, along, dims_along, one, row_rule, shape_of


@row_rule("gather")
def _gather(node: Node, known: Known) -> Rows:
    source, dim, index = node.args[0], dims_along(node)[0], node.args[2]
    rows = one(node, known)
    if known[source] is None:  # type: ignore[index]
        # A table: it may be read by an index along the tokens, but not by the place of a token in the row.
        if dim != rows.axis or known[index] is None:  # type: ignore[index]
            raise Mixes("it reads a table by the place in the row of tokens instead of by position_ids")
        return rows
    along(rows, [dim])
    return rows


@row_rule("select")
def _select(node: Node, known: Known) -> Rows:
    rows, dims = one(node, known), dims_along(node)
    along(rows, dims)
    return Rows(rows.axis + (dims[0] > rows.axis), rows.outer)


@row_rule("index_select")
def _index_select(node: Node, known: Known) -> Rows:
    source, dim, index = node.args[0], dims_along(node)[0], node.args[2]
    if known[index] is not None:  # type: ignore[index]
        if known[source] is not None:  # type: ignore[index]
            raise Mixes("it picks tokens")
        return Rows(dim, known[index].outer)  # type: ignore[index, union-attr]
    rows = one(node, known)
    along(rows, [dim])
    return rows


@row_rule("index")
def _index(node: Node, known: Known) -> Rows:
    """``x[..., ids, ...]`` with one index: a table read by values of the tokens, or columns picked by a constant."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    given = [(place, item) for place, item in enumerate(indices) if item is not None]
    if len(given) != 1 or flat_types(given[0][1].meta["type"])[0].dtype == "bool":
        raise Mixes("it picks values by several indices or by a mask")
    place, index = given[0]
    rank, width = len(shape_of(source)), len(shape_of(index))
    dim = place - rank
    if known[index] is not None:
        if known[source] is not None:  # type: ignore[index]
            raise Mixes("it picks tokens")
        return Rows(known[index].axis + dim + 1, known[index].outer)  # type: ignore[union-attr]
    rows = one(node, known)
    along(rows, [dim])
    return rows if rows.axis > dim else Rows(rows.axis - width + 1, rows.outer)


@row_rule("embedding")
def _embedding(node: Node, known: Known) -> Rows:
    table, index = node.args[0], node.args[1]
    if known[table] is not None or known[index] is None:  # type: ignore[index]
        raise Mixes("it looks up values of tokens")
    return Rows(known[index].axis - 1, known[index].outer)  # type: ignore[index, union-attr]


@row_rule("one_hot")
def _one_hot(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    return Rows(rows.axis - 1, rows.outer)
