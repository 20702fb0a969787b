"""Cuts of weights move to where the weights are read, so that a rank computes with its part from the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import POINTWISE, op_name, resolve
from ..ir.placement import Shard, annotate, shape_of
from ..ir.schemes import scheme_of

CALIBRATION = "calibration"
"""The option of a graph for ranks whose weights a calibration rounds: as wholes, of which a rank then takes its part."""

Cuts = dict[Node, Shard]


def sink_cuts(graph: Graph) -> None:
    """A part of what is computed from weights is computed from their parts, where that gives the same numbers.

    A row that is rounded with one factor is rounded whole before it is cut, and so is what a calibration rounds.
    """
    rounds_whole = bool(graph.options.get(CALIBRATION))
    cuts = [node for node in graph.calls() if op_name(node.target) in ("dist.shard", "dist.shard_columns")]
    while cuts:
        node = cuts.pop()
        source = node.args[0]
        assert isinstance(source, Node)
        operands = _operands(source, _cut(node)) if is_constant(source) and len(source.users) == 1 else None
        if operands is None or (rounds_whole and op_name(source.target) == "nn.quantize"):
            continue
        made = list(_parts(graph, node, operands))
        args: Any = _replaced(source.args, dict(zip(operands, made)))
        name, note = node.name, source.meta.get("source", "")
        part = insert_before(graph, node, source.target, args, source.kwargs, name=f"{name}_", source=note)
        annotate(part, _cut(node))
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        graph.erase_node(source)
        part.name = name
        cuts += made


def _cut(node: Node) -> Shard:
    """What a cut makes of its operand."""
    columns = op_name(node.target) == "dist.shard_columns"
    dim: Any = type_of(node).rank - 1 if columns else node.args[1]
    sections: Any = node.args[2]
    return Shard(dim, tuple(sections))


def _operands(source: Node, cut: Shard) -> Cuts | None:
    """The operands of a constant that are to be cut so that its part is computed from theirs; nothing if it is not."""
    name, rank = op_name(source.target), type_of(source).rank
    operands = source.all_input_nodes
    if name in POINTWISE:
        right = cut.dim - rank
        return {
            item: Shard(len(shape_of(item)) + right, cut.sections)
            for item in operands
            if len(shape_of(item)) >= -right and shape_of(item)[right] != 1
        }
    if name in ("aten.cat", "nn.cat_rows"):
        dim: Any = source.args[1] if len(source.args) > 1 else 0
        sizes = tuple(shape_of(item)[cut.dim] for item in operands)
        repeated = len(operands) != len(source.args[0])  # type: ignore[arg-type]
        if dim % rank != cut.dim or sizes != cut.sections or repeated:
            return None
        return {item: Shard(cut.dim, (size,)) for item, size in zip(operands, sizes)}
    if name == "aten.transpose.int":
        swapped: Any = source.args[1:3]
        one, other = (dim % rank for dim in swapped)
        return {operands[0]: Shard({one: other, other: one}.get(cut.dim, cut.dim), cut.sections)}
    if name == "nn.quantize" and len(source.args) < 4:
        scheme = scheme_of(str(source.args[1]))
        rows = cut.dim < rank - 1
        return {operands[0]: cut} if rows or (scheme is not None and scheme.group) else None
    return None


def _parts(graph: Graph, place: Node, operands: Cuts) -> Iterator[Node]:
    for item, cut in operands.items():
        kind, name, args = type_of(item), "dist.shard", (item, cut.dim, list(cut.sections))
        if scheme_of(kind.dtype) and cut.dim == kind.rank - 1:
            name, args = "dist.shard_columns", (item, kind.dtype, list(cut.sections))  # type: ignore[assignment]
        made = insert_before(graph, place, resolve(name), args, name=f"{item.name}_part", source="Shard")
        annotate(made, cut)
        yield made


def _replaced(value: Any, others: dict[Node, Node]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, others) for item in value)
    return others.get(value, value) if isinstance(value, Node) else value
