"""MergeQKV and MergeGateUp: projections of the same rows that are used together become one matmul."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import POINTWISE, aten, op_name
from .ledger import PassReport, asks_first
from .quantize import same_scheme
from .rule import hoist

_GATED = frozenset({"nn.silu_mul", "nn.gelu_mul", "aten.mul.Tensor"})
_HEADWISE = POINTWISE | {"aten.reshape", "aten.slice.Tensor", "aten.cat", "nn.rms_norm", "nn.layer_norm", "nn.rope"}


@asks_first
def merge_qkv(graph: Graph, report: PassReport) -> Graph:
    """Merge the projections that make one attention's queries, keys and values."""
    for node in list(graph.calls()):
        if op_name(node.target) != "nn.attention":
            continue
        sources = [_projection_of(item) for item in node.args[:3] if isinstance(item, Node)]
        if any(item is None for item in sources):
            report.refuse(node.name, "queries, keys and values are not each one projection", node)
            continue
        linears = list(dict.fromkeys(item for item in sources if item is not None))
        if len(linears) == 1:
            continue  # the model projects all three at once
        _merge(graph, linears, "qkv", report)
    return graph


@asks_first
def merge_gate_up(graph: Graph, report: PassReport) -> Graph:
    """Merge the two projections whose results are multiplied, one of them after an activation."""
    for node in list(graph.calls()):
        if op_name(node.target) not in _GATED or len(node.all_input_nodes) != 2:
            continue
        sources = [_through_pointwise(item) for item in node.all_input_nodes]
        linears = [item for item in sources if item is not None]
        if len(linears) == 2 and linears[0] is not linears[1] and linears[0].args[0] is linears[1].args[0]:
            if type_of(linears[0]) != type_of(linears[1]):
                report.refuse(node.name, "gate and up differ in width", node)
                continue
            _merge(graph, linears, "gate_up", report)
    return graph


def _projection_of(value: Node) -> Node | None:
    """The linear layer that a head's values come from, through work on single heads."""
    while value.op == "call_function":
        name = op_name(value.target)
        if name == "aten.linear":
            return value
        if name not in _HEADWISE:
            return None
        following = [item for item in _rows_of(value) if not is_constant(item)]
        value = following[0]
    return None


def _rows_of(value: Node) -> Iterator[Node]:
    """The operands as wide as the result's rows, the others being tables and vectors."""
    inputs = value.all_input_nodes
    if len(inputs) == 1:
        yield inputs[0]
        return
    rank = max(type_of(item).rank for item in inputs)
    yield from (
        (item for item in inputs if type_of(item).rank == rank) if op_name(value.target) != "nn.rope" else inputs[:1]
    )


def _through_pointwise(value: Node) -> Node | None:
    while value.op == "call_function":
        if op_name(value.target) == "aten.linear":
            return value
        if op_name(value.target) not in POINTWISE or len(value.all_input_nodes) != 1:
            return None
        value = value.all_input_nodes[0]
    return None


def _merge(graph: Graph, linears: Sequence[Node], what: str, report: PassReport) -> None:
    """Replace the linears by one on the concatenated weights and a slice for each."""
    ordered = list(linears)
    site = "+".join(node.name for node in ordered)
    why = _reason_against(ordered) or (
        "" if same_scheme(ordered, graph) else "their weights are to be quantised differently"
    )
    if why:
        report.refuse(site, why, ordered[-1])
        return
    if not report.allows(site):
        return
    first = min(ordered)
    x = first.args[0]
    for node in ordered:
        for operand in node.args[1:]:
            if isinstance(operand, Node):
                hoist(operand, first)

    def add(target: object, args: tuple[object, ...], name: str, source: str) -> Node:
        return insert_before(graph, first, target, args, name=name, source=source)

    layer = first.name.partition("_")[0] + "_" if first.name[0] == "l" and "_" in first.name else ""
    weight = add(aten("cat"), ([node.args[1] for node in ordered],), f"{layer}{what}_weight", "")
    operands: list[object] = [x, weight]
    if _bias(first) is not None:
        operands.append(add(aten("cat"), ([_bias(node) for node in ordered],), f"{layer}{what}_bias", ""))
    line = first.meta.get("source", "").rpartition("; ")[2]
    note = f"{report.name}; {line}" if line else report.name
    merged = add(aten("linear"), tuple(operands), f"{layer}{what}", note)
    parts, start = [], 0
    for node in ordered:
        width = type_of(node).shape[-1]
        assert isinstance(width, int)
        parts.append(add(aten("slice.Tensor"), (merged, -1, start, start + width), node.name, report.name))
        start += width
    for node, part in zip(ordered, parts):
        node.replace_all_uses_with(part)
        name = node.name
        graph.erase_node(node)
        part.name = name
    report.fused.append(merged.name)


def _bias(linear: Node) -> object:
    return linear.args[2] if len(linear.args) > 2 else None


def _reason_against(linears: Sequence[Node]) -> str:
    if len({node.args[0] for node in linears}) != 1:
        return "the projections read different rows"
    if len({_bias(node) is None for node in linears}) != 1:
        return "only some of the projections have a bias"
    if not all(is_constant(item) for node in linears for item in node.args[1:] if isinstance(item, Node)):
        return "a weight is computed from the tokens"
    if len({type_of(node).dtype for node in linears}) != 1:
        return "the projections differ in type"
    return ""
