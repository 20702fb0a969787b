"""SelectRows: logits are computed only for the rows that are asked for."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, flat_types, type_of
from ..ir.infer import infer
from ..ir.ops import POINTWISE, PROJECTIONS, aten, op_name
from ..ir.quantized import is_quantised
from ..ir.types import Dim, TensorType
from .ledger import PassReport

# Operators whose row t of the result depends on row t of their rows alone.
_ROWWISE = (
    POINTWISE
    | PROJECTIONS
    | {"nn.quantize", "nn.rms_norm", "nn.layer_norm", "aten.slice.Tensor", "dist.all_reduce", "dist.all_gather"}
)


def select_rows(graph: Graph, report: PassReport) -> Graph:
    """Add an input ``rows i64[R]``; the graph returns the logits of those rows.

    The selection moves up through all that works row by row, so that the final norm and the lm_head run on ``R`` rows.
    """
    result = graph.output_node().args[0]
    if not isinstance(result, Node) or flat_types(result.meta["type"])[0].shape[:1] != (Dim.named("T"),):
        return graph
    graph.dims["R"] = (0, graph.dims["T"][1])
    rows = graph.add_input("rows", TensorType("i64", (Dim.named("R"),)))
    chain: list[Node] = []
    source = result
    while True:
        following = _row_operand(source)
        if following is None or len(source.users) > 1:
            break
        chain.append(source)
        source = following
    user = chain[-1] if chain else graph.output_node()
    made = insert_before(graph, user, aten("index_select"), (source, 0, rows), name="sampled", source="SelectRows")
    user.replace_input_with(source, made)
    for node in reversed(chain):
        node.meta["type"] = infer(node.target, node.args, dict(node.kwargs))
        node.meta.pop("constant", None)
    report.fused.append(made.name)
    return graph


def _row_operand(node: Node) -> Node | None:
    """The one operand with rows of tokens, if the operator works row by row and every other operand is a vector."""
    if node.op != "call_function" or op_name(node.target) not in _ROWWISE:
        return None
    shape = type_of(node).shape
    with_rows: list[Any] = [
        item
        for item in node.all_input_nodes
        if any(isinstance(size, Dim) for size in flat_types(item.meta["type"])[0].shape)
    ]
    if op_name(node.target) == "aten.slice.Tensor" and node.args[1] != -1:
        return None
    if len(with_rows) != 1 or not shape or shape[0] != Dim.named("T") or len(shape) != 2:
        return None
    operand = with_rows[0]
    kind = flat_types(operand.meta["type"])[0]
    if is_quantised(operand) and _row_operand(operand) is None:
        return None  # rows are selected before they are rounded
    if kind.rank != 2 or kind.shape[0] != Dim.named("T"):
        return None
    return operand  # type: ignore[no-any-return]
