"""Refuse what would be silently wrong over concatenated sequences: any operator but attention that mixes tokens.

Every value that depends on the tokens must hold one row for each token, made from that token alone. The check follows
the axis of the rows from the inputs to the logits; an operator without a rule in ``row_rules`` is refused, never guessed.
"""

from __future__ import annotations

from torch.fx import Node

from . import row_lookups, row_shapes  # noqa: F401  (they add their rules)
from .dump import line_of
from .errors import UnsupportedModelError
from .graph import Graph, flat_types, node_inputs
from .row_rules import Mixes, Rows, rows_of_call
from .types import Dim


def refuse_mixing(graph: Graph) -> None:
    """Raise for the first operator, attention apart, that can carry information from one token to another.

    Raises:
        UnsupportedModelError: names the node and shows its line.
    """
    known: dict[Node, Rows | None] = {node: Rows(-1) for node in graph.inputs()}
    for node in graph.calls():
        try:
            rows = rows_of_call(node, known)
            _check_shape(node, rows)
        except Mixes as why:
            raise UnsupportedModelError(
                f"{node.name}: {why}; only attention may look at other tokens\n    {line_of(node)}"
            ) from None
        known[node] = rows
    for node in node_inputs(graph.output_node().args[0]):
        if known[node] != Rows(-2):
            raise UnsupportedModelError(f"{node.name}: the model's result is not one row of logits for each token")


def _check_shape(node: Node, rows: Rows | None) -> None:
    """The rows must be where the rule says, and nowhere else."""
    for kind in flat_types(node.meta["type"]):
        axes = [axis - kind.rank for axis, size in enumerate(kind.shape) if isinstance(size, Dim)]
        if rows is None and axes:
            raise Mixes("it makes one row for each token without reading the tokens or their positions")
        if rows is not None and axes != [rows.axis]:
            raise Mixes("its result does not hold one row for each token")
        if rows is not None:
            size = kind.shape[rows.axis]
            if not isinstance(size, Dim) or size.offset or size.terms[0][1] % rows.outer:
                raise Mixes(f"its result has {size} rows for T tokens")
