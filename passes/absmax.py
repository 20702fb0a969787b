"""Where a rank has a part of each row that is rounded, it is told the largest magnitude of the whole row."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant
from ..ir.ops import op_name, resolve
from ..ir.placement import shape_of
from ..ir.types import Dim
from .projections import is_projection, rows_and_weight


def give_absmax(graph: Graph, ranks: int, may_be_cut: Callable[[Node], bool]) -> None:
    """Rows that are rounded in each step are rounded by the largest magnitudes of as many parts of them as there are ranks.

    Then parts of rows become the same codes as whole rows. ``may_be_cut`` says of the weights that meet the codes whether
    they may be.
    """
    made: dict[tuple[object, ...], Node] = {}
    for node in list(graph.calls()):
        if op_name(node.target) != "nn.quantize" or is_constant(node):
            continue
        rows, scheme, divisors = node.args[0], node.args[1], node.args[3] if len(node.args) > 3 else None
        assert isinstance(rows, Node)
        if not all(is_projection(user) and may_be_cut(rows_and_weight(user)[1]) for user in node.users):
            continue
        if not isinstance(shape_of(rows)[0], Dim) or shape_of(rows)[-1] % ranks:
            continue  # with another dim in front no kernel reads them
        args = (rows, ranks) if divisors is None else (rows, ranks, divisors)
        if args not in made:
            name = f"{rows.name}_absmax"
            made[args] = insert_before(graph, node, resolve("nn.absmax"), args, name=name, source="Shard")
        node.args = (rows, scheme, 1, divisors, made[args])


def drop_absmax(graph: Graph) -> None:
    """Rows that every rank has whole are rounded as before."""
    for node in graph.calls():
        if op_name(node.target) == "nn.quantize" and len(node.args) > 4:
            rows, scheme, tries, divisors, largest = node.args
            assert isinstance(largest, Node)
            if op_name(largest.target) == "nn.absmax":  # else it is what the ranks have put together
                node.args = (rows, scheme) if divisors is None else (rows, scheme, tries, divisors)
