"""The table that tokens are looked up in: ranks may each have some of its rows (the vocabulary-parallel embedding)."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.dist import padded
from ..ir.graph import Graph, is_constant
from ..ir.ops import op_name, resolve
from ..ir.placement import Shard, shape_of
from .ledger import PassReport, Refusal

_TOKENS = "tokens"
_SAME = frozenset({"aten.reshape", "aten.unsqueeze", "aten.to.dtype", "aten.clamp"})


def is_lookup(node: Node) -> bool:
    """Whether a value is made of rows of a table that ranks may divide."""
    return node.op == "call_function" and op_name(node.target) == "nn.lookup"


def table_and_cut(node: Node, ranks: int) -> tuple[Node, Shard]:
    """The table of a lookup, and how it is cut: by its rows, padded so that ranks can divide them."""
    table = node.args[0]
    assert isinstance(table, Node)
    return table, Shard(0, (padded(shape_of(table)[0], ranks),))


def divide_lookups(graph: Graph, ranks: int, why_whole: Callable[[Node], str], report: PassReport) -> dict[Node, str]:
    """Where tokens are looked up in a weight, let a rank have some of its rows: ``nn.lookup`` gives zeros for the others.

    ``why_whole`` says of a weight why it is not to be cut, if so. Returns the lookups that stay as they are for it, with the
    reason. Tables of positions are small, and every rank has them.
    """
    kept: dict[Node, str] = {}
    for node in list(graph.calls()):
        if op_name(node.target) != "aten.embedding" or not _reads_tokens(node):
            continue
        table = node.args[0]
        assert isinstance(table, Node)
        if why := why_whole(table):
            kept[node] = why
        elif report.allows(node.name):
            node.target = resolve("nn.lookup")
            node.args, node.kwargs = node.args[:2], {}
            _sum_up(graph, node)
            count, (rows,) = shape_of(table)[0], table_and_cut(node, ranks)[1].sections
            if count != rows:
                why = f"padded to {rows} rows, since {count} cannot be divided among {ranks} ranks"
                report.near.append(Refusal(node.name, why))
    return kept


def _sum_up(graph: Graph, node: Node) -> None:
    """Add the ranks' rows up at once: what layers add to them is then rounded as in one process, and all layers are alike."""
    users = list(node.users)
    args, name = (node,), f"{node.name}_reduced"
    total = insert_before(graph, node.next, resolve("dist.all_reduce"), args, name=name, source="Shard")
    for user in users:
        user.replace_input_with(node, total)


def _reads_tokens(node: Node) -> bool:
    table, ids = node.args[:2]
    while isinstance(ids, Node) and op_name(ids.target) in _SAME:
        ids = ids.args[0]
    return isinstance(table, Node) and is_constant(table) and isinstance(ids, Node) and ids.name == _TOKENS
