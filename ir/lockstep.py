"""Run the graph of one of several ranks for all of them, operator by operator: none has to wait for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .graph import Graph
from .interpret import Values, bind_dims, read, value_of
from .ops import is_collective


@dataclass(frozen=True)
class _Side:
    """A rank of a group that meets where it is at hand what all of them ``brought``."""

    rank: int
    brought: Sequence[Tensor]

    @property
    def size(self) -> int:
        return len(self.brought)

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self.brought
        return sum(others, first)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return list(self.brought)


def interpret_on_ranks(
    graph: Graph, inputs: Values, weights: Values, caches: Sequence[Values]
) -> list[tuple[Tensor, ...]]:
    """The results of a graph as each rank has them; all have the same inputs and weights.

    Args:
        caches: those of each rank, of which there are as many; see ``interpret``.
    """
    dims = bind_dims(graph, inputs)
    values: list[dict[Node, Any]] = [{} for _ in caches]
    for node in graph.nodes:
        if node.op == "output":
            results = [read(node.args[0], own, dims) for own in values]
            return [tuple(item) if isinstance(item, (list, tuple)) else (item,) for item in results]
        brought = [own[node.args[0]] for own in values] if is_collective(node.target) else []
        for rank, (own, stores) in enumerate(zip(values, caches)):
            own[node] = value_of(node, own, dims, inputs, weights, stores, _Side(rank, brought))
    raise AssertionError("a graph has an output")
