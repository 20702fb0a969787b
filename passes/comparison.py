"""Run graphs on the same random sequences and say how far their results are apart.

Sequences of two lengths are run, each by itself; a graph over a paged cache gets them side by side in three steps: a
ragged prefill, a step of one and two tokens, and one of a single token each, over caches full of NaN where nothing was
written. What it gives for a token must be what the unpaged graph gives for that token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dist import ranks_of
from ..ir.draws import DrawnWeights, draw_input, row_axis
from ..ir.graph import Graph, dims_of, flat_types, node_inputs, type_of
from ..ir.lockstep import interpret_on_ranks
from ..ir.placement import VOCABULARY
from ..ir.quantized import rounds_rows, without_rounding
from ..ir.twin import is_narrow, shortened, widened, windows_of
from ..ir.types import TensorType

TOLERANCE = 1e-5
"""Relative RMSE in fp32 that a result may differ by; legal rewrites stay within 2e-6."""

_PAGING = frozenset({"slots", "block_tables", "query_starts", "context_lens", "rows"})
_SHORT = 6  # tokens of the second sequence
_POOL = 5  # blocks of the cache
_TABLES = ((3, 1), (0, 0))  # the blocks of each sequence, out of order

Run = tuple[dict[str, Tensor], list[int]]
"""The inputs of one run, and the numbers of its tokens, counted through all sequences."""


@dataclass(frozen=True)
class Result:
    """One result of a graph, its tokens in the first dim; ``rows`` are their numbers."""

    values: Tensor
    rows: tuple[int, ...]


def _whole_logits(graph: Graph, ranks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of the first rank; where a graph returns its part of the logits, those of all, without added columns."""
    if VOCABULARY not in graph.options:
        return ranks[0]
    return (torch.cat([results[0] for results in ranks], 1)[:, : graph.options[VOCABULARY]], *ranks[0][1:])


@dataclass
class Comparison:
    """Runs graphs that came of one another on the same draws.

    ``wide`` and ``windows`` are taken from the first of them: where it is narrow, all are compared in fp32, and their
    windows are shortened by the same amounts. ``block`` is the number of tokens in a block of the paged cache.
    """

    wide: bool
    windows: tuple[int, ...]
    block: int
    seed: int = 0
    weights: dict[tuple[str, TensorType], Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(graph: Graph) -> Comparison:
        """For a graph and what passes make of it."""
        return Comparison(is_narrow(graph), windows_of(graph), graph.options.get("kv_block", 16))

    def reseeded(self, seed: int) -> Comparison:
        """The same with other numbers."""
        return Comparison(self.wide, self.windows, self.block, seed)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of each sequence; the first reaches over a block of the cache."""
        return self.block + 3, _SHORT

    def results(self, graph: Graph) -> list[Result]:
        """What the graph gives for every token of the sequences, without rounding activations: that makes a large difference
        of a small one. Raises whatever an operator raises on them."""
        graph = without_rounding(graph, rows_only=True) if rounds_rows(graph) else graph
        graph = shortened(widened(graph) if self.wide else graph, self.windows)
        weights = DrawnWeights(graph, self.seed, self.weights)
        kinds = [type_of(node) for node in node_inputs(graph.output_node().args[0])]
        found: list[list[Tensor]] = [[] for _ in kinds]
        rows: list[list[int]] = [[] for _ in kinds]
        caches = [self._caches(graph) for _ in range(ranks_of(graph))]
        with torch.inference_mode():
            for inputs, tokens in self._runs(graph):
                chosen = [tokens[row] for row in inputs["rows"].tolist()] if "rows" in inputs else tokens
                results = _whole_logits(graph, interpret_on_ranks(graph, inputs, weights, caches))
                for place, (kind, value) in enumerate(zip(kinds, results)):
                    axis = row_axis(kind)
                    if found[place] and not dims_of([kind]):
                        continue  # the same in every run
                    found[place].append((value.reshape(-1) if axis is None else value.movedim(axis, 0)).clone())
                    if axis is not None:
                        rows[place] += chosen if str(kind.shape[axis]) == "R" else tokens
        return [Result(torch.cat(values), tuple(places)) for values, places in zip(found, rows)]

    def _runs(self, graph: Graph) -> Iterator[Run]:
        names = {node.name for node in graph.inputs()}
        starts = (0, self.lengths[0])
        if "block_tables" not in names:
            for index, count in enumerate(self.lengths):
                yield self._step(graph, [(index, 0, count)], starts)
            return
        long, short = self.lengths
        for cuts in (
            [(0, 0, long - 2), (1, 0, short - 3)],
            [(0, long - 2, long - 1), (1, short - 3, short - 1)],
            [(0, long - 1, long), (1, short - 1, short)],
        ):
            yield self._step(graph, cuts, starts)

    def _step(self, graph: Graph, cuts: Sequence[tuple[int, int, int]], starts: Sequence[int]) -> Run:
        """The inputs for parts ``(sequence, first token, last token + 1)`` side by side."""
        tokens = [starts[index] + place for index, first, last in cuts for place in range(first, last)]
        slots = [
            _TABLES[index][place // self.block] * self.block + place % self.block
            for index, first, last in cuts
            for place in range(first, last)
        ]
        counts = [last - first for _, first, last in cuts]
        known = {
            "slots": torch.tensor(slots),
            "block_tables": torch.tensor([_TABLES[index] for index, _, _ in cuts], dtype=torch.int32),
            "query_starts": torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            "context_lens": torch.tensor([last for _, _, last in cuts], dtype=torch.int32),
            "rows": torch.arange(len(tokens) - 1, -1, -2),  # every other one, the last first
        }
        inputs = {}
        for node in graph.inputs():
            if node.name in _PAGING:
                inputs[node.name] = known[node.name]
                continue
            axis, parts = row_axis(type_of(node)), []
            for index, first, last in cuts:
                whole = draw_input(node, dict.fromkeys("TR", self.lengths[index]), 2 * self.seed + index)
                parts.append(whole if axis is None else whole.narrow(axis, first, last - first))
            inputs[node.name] = parts[0] if axis is None else torch.cat(parts, axis)
            if axis is not None and str(type_of(node).shape[axis]) == "R" and _has_rows(graph):
                inputs[node.name] = inputs[node.name].index_select(axis, known["rows"])
        return inputs, tokens

    def _caches(self, graph: Graph) -> dict[str, Tensor]:
        found = {}
        for node in graph.calls():
            if str(node.target) == "cache":
                kind = type_of(node)
                # Codes have factors, which are NaN.
                value = math.nan if kind.torch_dtype.is_floating_point else 0
                shape = kind.concrete({"C": _POOL * self.block})
                found[f"{node.args[0]}{node.args[1]}"] = torch.full(shape, value, dtype=kind.torch_dtype)
        return found


def _has_rows(graph: Graph) -> bool:
    return any(node.name == "rows" for node in graph.inputs())


def returning(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with other values as its results, by name, and without what they do not need."""
    twin = graph.copy()
    nodes = {node.name: node for node in twin.nodes}
    results = [nodes[name] for name in names]
    twin.output_node().args = (results[0] if len(results) == 1 else results,)
    twin.eliminate_dead()
    for node in twin.inputs():
        if not node.users and node.name not in _PAGING:
            twin.erase_node(node)
    used = dims_of(node.meta["type"] for node in twin.nodes if node.op != "output")
    twin.dims = {name: bounds for name, bounds in twin.dims.items() if name in used}
    return twin


def is_comparable(node: Node) -> bool:
    """Whether a value can be a result that is compared: one tensor of floats that is no cache."""
    kinds = flat_types(node.meta["type"]) if "type" in node.meta else ()
    return (
        len(kinds) == 1
        and not isinstance(node.meta["type"], tuple)
        and kinds[0].torch_dtype.is_floating_point
        and not any(name in str(size) for size in kinds[0].shape for name in "SBC")
    )


def distances(expected: Sequence[Result], found: Sequence[Result]) -> list[float]:
    """The relative RMSE of each result over the tokens that ``found`` gives; infinite if they cannot be compared."""
    if len(expected) != len(found):
        return [math.inf]
    return [_distance(left, right) for left, right in zip(expected, found)]


def _distance(expected: Result, found: Result) -> float:
    left, right = expected.values, found.values
    if expected.rows != found.rows:
        places = {row: place for place, row in enumerate(expected.rows)}
        if not found.rows or not places.keys() >= set(found.rows):
            return math.inf
        left = left[[places[row] for row in found.rows]]
    if left.numel() != right.numel():
        return math.inf
    left, right = left.reshape(-1).double(), right.reshape(-1).double()
    # An operator out of its domain gives NaN or infinity before and after; that says nothing.
    known = left.isfinite()
    if not torch.equal(left[~known].nan_to_num(0.0, 1.0, -1.0), right[~known].nan_to_num(0.0, 1.0, -1.0)):
        return math.inf
    left, right = left[known], right[known]
    if not right.isfinite().all():
        return math.inf
    return float((left - right).norm() / left.norm().clamp_min(1e-30))


def is_blind(results: Sequence[Result]) -> bool:
    """Whether none of the results holds a finite number that is not zero, so that comparing them says nothing."""
    return not any((item.values.double().nan_to_num(0.0, 0.0, 0.0) != 0).any() for item in results)
