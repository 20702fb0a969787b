"""SinkTransposes: models work on ``[heads, T, d]``; with the transposes moved down, rows of tokens are left."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, node_inputs, type_of
from ..ir.infer import TypeInferenceError
from ..ir.ops import POINTWISE, aten, op_name
from .ledger import PassReport, asks_first

_LAST_DIM_ONLY = frozenset({"aten.slice.Tensor", "aten.cat", "aten.mean.dim", "aten.softmax.int", "aten.stack"})
_NORMS = frozenset({"aten.layer_norm", "aten.rms_norm", "nn.rms_norm", "nn.layer_norm"})


@asks_first
def sink_transposes(graph: Graph, report: PassReport) -> Graph:
    """Rewrite ``op(transpose(x))`` as ``transpose(op(x))`` where ``op`` works on the last dim, and cancel pairs."""
    for node in list(graph.calls()):
        if _is_swap(node) and isinstance(node.args[0], Node) and _is_swap(node.args[0]):
            base = node.args[0].args[0]
            assert isinstance(base, Node)
            if not report.allows(node.name):
                continue
            node.replace_all_uses_with(base)
            graph.erase_node(node)
            report.fused.append(base.name)
        elif _sinks(node) and report.allows(node.name):
            made = _sink(graph, node)
            if made is not None:
                report.fused.append(made)
    return graph


def _is_swap(node: Node) -> bool:
    """Whether a value is ``[heads, T, d]`` or ``[heads, T, d, e]`` made of tokens' rows of heads, or the other way."""
    return (
        node.op == "call_function"
        and op_name(node.target) == "aten.transpose.int"
        and (type_of(node).rank, set(node.args[1:])) in ((3, {-3, -2}), (4, {-4, -3}))
    )


def _sinks(node: Node) -> bool:
    name = op_name(node.target)
    if not any(_is_swap(item) for item in node_inputs(node.args)):
        return False
    if name in _LAST_DIM_ONLY:
        dims = node.args[1] if len(node.args) > 1 else 0
        return dims in (-1, [-1]) or list(dims if isinstance(dims, (list, tuple)) else [dims]) == [-1]
    return name in POINTWISE or name in _NORMS or (name == "aten.reshape" and _keeps_rows(node))


def _keeps_rows(node: Node) -> bool:
    """A reshape that only folds or splits dims after the first two of ``[heads, T, ...]``."""
    source = node.args[0]
    return isinstance(source, Node) and type_of(source).shape[:2] == type_of(node).shape[:2] and type_of(node).rank == 3


def _sink(graph: Graph, node: Node) -> str | None:
    """Returns the name of the value that was moved, or nothing if an operand has no transposed form."""
    made: list[Node] = []

    def turned(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [turned(item) for item in value]
        if not isinstance(value, Node):
            return value
        kind = type_of(value)
        if _is_swap(value):
            return value.args[0]
        if kind.rank <= 1 or (kind.rank == 2 and kind.shape[0] == 1):
            return value
        if kind.rank == 3 and kind.shape[0] == 1 and kind.shape[1] == 1:
            return value
        if kind.rank == 3 and kind.shape[0] == 1:
            table = for_all_heads(value)
            if table is not None:
                return add(aten("unsqueeze"), (table, -2))
        if kind.rank == 3:
            return add(aten("transpose.int"), (value, -3, -2))
        if kind.rank == 2:  # [T, d] against [heads, T, d] is [T, 1, d] against [T, heads, d]
            return add(aten("unsqueeze"), (value, -2))
        raise LookupError

    def for_all_heads(value: Node) -> Node | None:
        """The ``[T, d]`` that a value is, with a dim for the heads in front; nothing if that is not how it is made."""
        if op_name(value.target) == "aten.unsqueeze":
            return value.args[0] if value.args[1] == -3 else None  # type: ignore[return-value]
        if (
            op_name(value.target) not in ("aten.slice.Tensor", "aten.repeat_interleave.self_int")
            or -1 not in value.args
        ):
            return None
        table = for_all_heads(value.args[0])  # type: ignore[arg-type]
        return None if table is None else add(value.target, (table, *value.args[1:]))

    def add(target: Any, args: Any) -> Node:
        fresh = insert_before(graph, node, target, args)
        made.append(fresh)
        return fresh

    try:
        args = list(turned(list(node.args)))
        if op_name(node.target) == "aten.reshape":
            shape = type_of(node).shape
            args[1] = [shape[1], shape[0], *shape[2:]]
        moved = insert_before(graph, node, node.target, args, node.kwargs, source=node.meta.get("source", ""))
        made.append(moved)
        rank = type_of(node).rank
        back = add(aten("transpose.int"), (moved, -rank, 1 - rank))
        if type_of(back) != type_of(node):
            raise LookupError
    except (LookupError, TypeInferenceError):
        for fresh in reversed(made):
            if not fresh.users:
                graph.erase_node(fresh)
        return None
    node.replace_all_uses_with(back)
    name = node.name
    graph.erase_node(node)
    moved.name = name
    return name
