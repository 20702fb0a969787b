"""The rows of an output projection that ranks cannot divide are padded, so that each rank has as many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.infer import infer
from ..ir.ops import POINTWISE, aten, op_name, resolve
from .ledger import PassReport, Refusal

# A rank's part of the vocabulary is a multiple of it: rows of logits that begin where vector loads can.
_UNIT = 16


def pad_vocabulary(graph: Graph, ranks: int, may_be_cut: Callable[[Node], bool], report: PassReport) -> None:
    """Where the graph returns a projection, or what is computed from each of its outputs alone, and ranks cannot divide
    these, its last row is stated so often that they can. What is made of it is taken away from the result.

    ``may_be_cut`` says of a weight whether it may be.
    """
    result = graph.output_node().args[0]
    way = _way(result) if isinstance(result, Node) else []
    width: Any = type_of(way[0]).shape[-1] if way else 0
    if not way or width % ranks == 0 or not may_be_cut(way[0].args[1]):  # type: ignore[arg-type]
        return
    assert isinstance(result, Node)
    linear = way[0]
    padded = -(-width // (ranks * _UNIT)) * ranks * _UNIT
    times = [1, 1 + padded - width]
    for operand in linear.args[1:3]:
        if isinstance(operand, Node):
            args, name = (operand, [width - 1, 1], times, 1), f"{operand.name}_padded"
            made = insert_before(graph, linear, resolve("nn.repeat_rows"), args, name=name, source="Shard")
            linear.replace_input_with(operand, made)
    for node in way:
        node.meta["type"] = infer(node.target, node.args, dict(node.kwargs))
    output = graph.output_node()
    taken = (result, -1, 0, width)
    cut = insert_before(graph, output, aten("slice.Tensor"), taken, name=f"{result.name}_unpadded", source="Shard")
    output.replace_input_with(result, cut)
    report.near.append(
        Refusal(linear.name, f"padded to {padded} outputs, since {width} cannot be divided among {ranks} ranks")
    )


def _way(result: Node) -> list[Node]:
    """From the projection on, what leads to a result and nowhere else; nothing if it is not made like that."""
    way = [result]
    while way[0].op == "call_function" and len(way[0].users) == 1:
        node = way[0]
        if op_name(node.target) == "aten.linear":
            constant = all(is_constant(item) for item in node.args[1:] if isinstance(item, Node))
            return way if constant else []
        source = node.args[0] if op_name(node.target) in POINTWISE and node.args else None
        if not isinstance(source, Node):
            return []
        if any(type_of(item).shape[-1:] not in ((), (1,)) for item in node.all_input_nodes if item is not source):
            return []
        way.insert(0, source)
    return []
