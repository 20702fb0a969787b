"""Heads of keys and values that are fewer than ranks are repeated, so that each rank has those of its queries."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.infer import infer
from ..ir.ops import POINTWISE, PROJECTIONS, op_name, resolve

_NORMS = frozenset({"nn.rms_norm", "nn.layer_norm"})


def repeat_heads(graph: Graph, ranks: int) -> None:
    """Where queries can be divided among the ranks and keys and values cannot, each head of these is stated several times,
    for some of the query heads that share it each time. Attention computes the same.

    What is not made by one projection and work on single heads stays as it is.
    """
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
        found = _ranges([way for way in ways if way]) if all(ways) else None
        if found:
            _repeat(graph, [way for way in ways if way], found, times)


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


def _ranges(ways: list[list[Node]]) -> dict[Node, list[tuple[int, int]]] | None:
    """For each projection, the outputs that the ways begin with; nothing if others read some of them."""
    found: dict[Node, list[tuple[int, int]]] = {}
    for linear, first, *_ in ways:
        found.setdefault(linear, []).append(_taken(linear, first))
    inside = {node for way in ways for node in way}
    for linear, ranges in found.items():
        for user in linear.users:
            start, stop = _bounds(user) if op_name(user.target) == "aten.slice.Tensor" else (0, 0)
            if user not in inside and any(start < end and begin < stop for begin, end in ranges):
                return None
        if len(ranges) > 1 and any(end > begin for (_, end), (begin, _) in pairwise(sorted(ranges))):
            return None
    return found


def _taken(linear: Node, first: Node) -> tuple[int, int]:
    """The outputs of a projection that what first reads it takes."""
    return _bounds(first if op_name(first.target) == "aten.slice.Tensor" else linear)


def _bounds(node: Node) -> tuple[int, int]:
    """The outputs that a slice takes, or all of a projection's."""
    if op_name(node.target) != "aten.slice.Tensor":
        width: Any = type_of(node).shape[-1]
        return 0, width
    start, stop, *step = node.args[2:]
    assert isinstance(start, int) and isinstance(stop, int)
    whole: Any = type_of(node.args[0]).shape[-1]  # type: ignore[arg-type]
    return (start, min(stop, whole)) if not step and node.args[1] == -1 else (0, whole)


def _repeat(graph: Graph, ways: list[list[Node]], found: dict[Node, list[tuple[int, int]]], times: int) -> None:
    widths: dict[tuple[Node, tuple[int, int]], Any] = {}  # of a head: those of values may be others than those of keys
    for linear, first, *rest in ways:
        widths[linear, _taken(linear, first)] = type_of([first, *rest][-1]).shape[-1]
    for linear, ranges in found.items():
        points = sorted({*_bounds(linear), *(point for bounds in ranges for point in bounds)})
        parts = list(pairwise(points))
        sizes = [stop - start for start, stop in parts]
        slices = [user for user in linear.users if op_name(user.target) == "aten.slice.Tensor"]
        for width in sorted({widths[linear, bounds] for bounds in ranges}):
            counts = [times if widths.get((linear, bounds)) == width else 1 for bounds in parts]
            for operand in linear.args[1:3]:
                if isinstance(operand, Node):
                    args, name = (operand, sizes, counts, width), f"{operand.name}_repeated"
                    made = insert_before(graph, linear, resolve("nn.repeat_rows"), args, name=name, source="Shard")
                    linear.replace_input_with(operand, made)
            sizes = [size * count for size, count in zip(sizes, counts)]
        linear.meta["type"] = infer(linear.target, linear.args, dict(linear.kwargs))
        for user in slices:
            start, stop = _bounds(user)
            before = sum(end - begin for begin, end in ranges if end <= start)
            own = stop - start if (start, stop) in ranges else 0
            shift = before * (times - 1)
            user.args = (*user.args[:2], start + shift, stop + shift + own * (times - 1))
    for _, *rest in ways:
        for node in rest:
            if op_name(node.target) == "aten.reshape":
                shape: Any = node.args[1]
                at = len(shape) - 2
                node.args = (node.args[0], [*shape[:at], shape[at] * times, *shape[at + 1 :]])
            node.meta["type"] = infer(node.target, node.args, dict(node.kwargs))
