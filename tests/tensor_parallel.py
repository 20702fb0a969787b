"""Ranks of a graph without a runtime: each interprets it in a thread, and what each gave is put together again."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from fuseline.ir.dist import Group
from fuseline.ir.graph import Graph
from fuseline.ir.interpret import interpret
from fuseline.runtime.groups import simulated


def on_ranks(
    graph: Graph, ranks: int, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> list[tuple[Tensor, ...]]:
    """The results of a graph as each rank has it."""

    def run(group: Group) -> tuple[Tensor, ...]:
        return interpret(graph, inputs, weights, group=group)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, simulated(ranks)))
