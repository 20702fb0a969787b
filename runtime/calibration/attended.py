"""Attention reads means of values, and those are products of means of the values' inputs: rounding has to keep these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...ir.attention import attention
from ...ir.graph import is_constant
from ...ir.ops import PROJECTIONS, op_name
from .makers import rows_of

_SHAPES = frozenset({"aten.slice.Tensor", "aten.reshape"})
# Means of so many windows are enough: each token has one for every head.
_WINDOWS = 16


@dataclass(frozen=True)
class Values:
    """``reader`` (``nn.paged_attention``) takes means of what rows ``begin`` to ``end`` of a projection's weight make, which
    nothing else reads. ``queries`` and ``keys`` (``nn.cache_write``) are what it chooses them by, and ``sinks``, if it has
    some."""

    reader: Node
    begin: int
    end: int
    queries: Node
    keys: Node
    sinks: Node | None

    def hessian(
        self, rows: Tensor, queries: Tensor, keys: Tensor, sinks: Tensor | None, starts: Sequence[int]
    ) -> Tensor:
        """The sum of ``m^T m`` over the means ``m`` of ``rows [T, K]`` that the heads take, ``f32 [K, K]``.

        Rows that most tokens attend to, such as the first of a text, count more than others.

        Args:
            queries, keys: ``[T, H, D]`` and ``[T, KV, D]``.
            starts: where each sequence begins, and the last one ends.
        """
        scale, *how = self.reader.args[7:11]
        found = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        step = -(-(len(starts) - 1) // _WINDOWS)
        for first, last in zip(starts[:-1:step], starts[1::step]):
            shared = rows[first:last, None].to(queries.dtype).expand(-1, keys.shape[1], -1)
            chosen_by = queries[first:last], keys[first:last]
            means = attention(*chosen_by, shared, 0, scale, *how, sinks=sinks)
            flat = means.reshape(-1, rows.shape[1]).float()
            found += flat.t() @ flat
        return found


def values_of(projection: Node) -> Values | None:
    """The rows of a projection that make values and nothing else, if it has some."""
    for node in projection.users:
        while op_name(node.target) in _SHAPES and len(node.users) == 1:
            node = next(iter(node.users))
        reader = next(iter(node.users), node)
        if len(node.users) != 1 or op_name(reader.target) != "nn.paged_attention" or len(reader.args) > 12:
            continue  # more arguments are the factors of codes
        made = rows_of(node.args[1]) if reader.args[2] is node else None
        keys, sinks = reader.args[1], reader.args[11] if len(reader.args) > 11 else None
        if made and made[0] is projection and isinstance(keys, Node) and op_name(keys.target) == "nn.cache_write":
            return Values(reader, *made[1:], reader.args[0], keys, sinks)  # type: ignore[arg-type]
    return None


def ahead(
    node: Node,
    known: dict[Node, Any],
    computed: Mapping[Node, Any],
    weight: Callable[[Node], Any],
    run: Callable[[Node, Mapping[Node, Any]], Any],
) -> Any:
    """What a node will compute; none if that takes a projection whose weight is still to be rounded.

    Args:
        known: what is computed on the way, or given before; ``computed``: what was computed before, of constants perhaps
            for another layer.
        weight: loads a weight; ``run``: calls an operator on given values.
    """
    if node in known:
        return known[node]
    if not is_constant(node) and computed.get(node) is not None:
        return computed[node]
    name = op_name(node.target)
    if name == "weight":
        known[node] = weight(node)
    elif name in PROJECTIONS or name == "nn.quantize":
        known[node] = None
    else:
        inputs = [ahead(item, known, computed, weight, run) for item in node.all_input_nodes]
        known[node] = None if any(item is None for item in inputs) else run(node, {**computed, **known})
    return known[node]
