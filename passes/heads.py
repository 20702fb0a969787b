"""Heads of keys and values that are fewer than ranks are repeated, so that each rank has those of its queries."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.infer import Inference
from ..ir.ops import POINTWISE, PROJECTIONS, op_name, resolve

_NORMS = frozenset({"nn.rms_norm", "nn.layer_norm"})


def repeat_heads(graph: Graph, ranks: int) -> None:
    """Where queries can be divided among the ranks and keys and values cannot, each head of these is stated several times,
    for some of the query heads that share it each time. Attention computes the same.

    What is not made by one projection and work on single heads stays as it is.
    """
    infer = Inference()
    for node in list(graph.calls()):
        if op_name(node.target) != "nn.attention":
            continue
        q, k, v = node.args[:3]
        assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
        queries, heads = (type_of(item).shape[-2] for item in (q, k))
        assert isinstance(queries, int) and isinstance(heads, int)
        if queries % ranks or not heads % ranks:
            continue
        times = next(
            count
            for count in range(2, queries // heads + 1)
            if not heads * count % ranks and not queries % (heads * count)
        )
        ways = [_way(item, node) for item in dict.fromkeys((k, v))]
        if all(ways):
            _repeat(graph, [way for way in ways if way], times, infer)


def _way(value: Node, attention: Node) -> list[Node] | None:
    """From the projection that makes an attention's keys or values to these; nothing if others read anything on the way,
    or what is done there is not the same for all heads."""
    way, apart = [value], True
    while way[0].op == "call_function":
        node = way[0]
        name = op_name(node.target)
        if name in PROJECTIONS:
            constant = all(is_constant(item) for item in node.args[1:3] if isinstance(item, Node))
            sliced = all(op_name(user.target) == "aten.slice.Tensor" for user in node.users if user not in way)
            return way if constant and sliced and not apart else None
        source = node.args[0]
        if not isinstance(source, Node) or any(user not in way and user is not attention for user in node.users):
            return None
        others = [item for item in node.all_input_nodes if item is not source]
        if name == "aten.reshape" and apart:
            apart = False
            if type_of(source).shape[:-1] != type_of(node).shape[:-2]:
                return None
        elif name in POINTWISE or (name in _NORMS and apart):
            if any(not is_constant(item) or type_of(item).rank > apart for item in others):
                return None
        elif not (name == "nn.rope" and apart) and not (name == "aten.slice.Tensor" and not apart):
            return None
        way.insert(0, source)
    return None


def _repeat(graph: Graph, ways: list[list[Node]], times: int, infer: Inference) -> None:
    sections: dict[Node, list[tuple[int, int]]] = {}
    width: Any = 0
    for linear, *rest in ways:
        total = type_of(linear).shape[-1]
        bounds = next((item.args[2:4] for item in rest if op_name(item.target) == "aten.slice.Tensor"), (0, total))
        sections.setdefault(linear, []).append(bounds)  # type: ignore[arg-type]
        width = type_of(rest[-1]).shape[-1]
    for linear, ranges in sections.items():
        total = type_of(linear).shape[-1]
        assert isinstance(total, int)
        points = sorted({0, total, *(point for bounds in ranges for point in bounds)})
        parts = list(pairwise(points))
        counts = [times if bounds in ranges else 1 for bounds in parts]
        sizes = [stop - start for start, stop in parts]
        for place, operand in enumerate(linear.args):
            if place and isinstance(operand, Node):
                made = insert_before(
                    graph,
                    linear,
                    infer,
                    resolve("nn.repeat_rows"),
                    (operand, sizes, counts, width),
                    name=f"{operand.name}_repeated",
                    source="Shard",
                )
                linear.replace_input_with(operand, made)
        linear.meta["type"] = infer(linear.target, linear.args, dict(linear.kwargs))
        moved, at = {}, 0
        for (start, stop), size, count in zip(parts, sizes, counts):
            moved[start, stop] = (at, at + size * count)
            at += size * count
        for user in linear.users:
            if op_name(user.target) == "aten.slice.Tensor":
                user.args = (*user.args[:2], *moved[user.args[2], user.args[3]])  # type: ignore[index]
    for _, *rest in ways:
        for node in rest:
            if op_name(node.target) == "aten.reshape":
                shape: Any = node.args[1]
                at = len(shape) - 2
                node.args = (node.args[0], [*shape[:at], shape[at] * times, *shape[at + 1 :]])
            node.meta["type"] = infer(node.target, node.args, dict(node.kwargs))
