"""The columns of logits: of all tokens, or of the part of the vocabulary that a rank has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ..codegen.exchange import Exchange
from ..codegen.launch import load_greedy
from ..ir.dist import Group
from ..ir.graph import Graph, type_of
from ..ir.placement import VOCABULARY
from .columns import gathering
from .step import Model


class Vocabulary:
    """All tokens, ``size`` of them, of which each rank computes all logits.

    ``columns`` is how many logits of a row the model of this process makes; ``together`` says whether ranks choose the most
    likely tokens together, so that all have the same.
    """

    together = False

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = self.columns = size
        self._choose = load_greedy() if torch.device(device).type == "cuda" else _choose

    def whole(self, logits: Tensor) -> Tensor:
        """The logits ``[R, size]`` of the rows whose ``logits [R, columns]`` a model has made."""
        return logits

    def greedy(self, logits: Tensor, tokens: Tensor, finite: Tensor) -> None:
        """Fill in the most likely token of each row of ``logits [R, columns]``, the lowest id among equals, and whether all
        of the row is finite: ``tokens i64[R]``, ``finite bool[R]``. Does not wait for the device."""
        self._choose(logits, tokens, finite)

    def of(self, model: Model) -> Model:
        """The same model with whole logits."""
        return lambda step: self.whole(model(step))


class DividedVocabulary(Vocabulary):
    """Each rank makes the logits of ``width`` tokens, the last of which may count for nothing; all call this together.

    Most likely tokens are found without the logits of others: the largest of each rank, its id and whether all are finite
    go round.
    """

    together = True

    def __init__(self, size: int, width: int, groups: Sequence[Group], exchange: Exchange | None = None) -> None:
        """``groups`` are the ranks of this process, whose logits stand next to each other: all ranks, or one of them."""
        self.size, self.columns, self._width = size, width * len(groups), width
        self._groups = groups
        self._group = groups[0] if len(groups) == 1 else None
        self._exchange = exchange
        self._gather = gathering(groups[0], exchange)
        self._launch = load_greedy(groups[0].size) if exchange is not None else None

    def whole(self, logits: Tensor) -> Tensor:
        if self._group is not None:
            if self._exchange is not None:
                self._exchange.begin()  # the step that made them, perhaps a recorded one, has its own meetings
            logits = self._gather(logits)
        return logits[:, : self.size]

    def greedy(self, logits: Tensor, tokens: Tensor, finite: Tensor) -> None:
        if self._launch is not None and self._launch(logits, tokens, finite, self.size, self._exchange):
            return
        parts = [
            _found(logits[:, place * self._width :][:, : self._width], group.rank * self._width, self.size)
            for place, group in enumerate(self._groups)
        ]
        if self._group is not None:
            parts = self._group.all_gather(parts[0])
        tops, ids, healthy = torch.stack(parts, 1).unbind(2)
        # A row with a part that is no number has some token, and is not finite.
        largest = tops == tops.amax(1, keepdim=True)
        tokens.copy_(ids.where(largest, self.size - 1).amin(1))
        finite.copy_(healthy.all(1))


def vocabulary_of(
    graph: Graph, groups: Sequence[Group], device: torch.device, exchange: Exchange | None = None
) -> Vocabulary:
    """What the logits that a lowered graph returns are of."""
    result = graph.output_node().args[0]
    assert isinstance(result, Node)
    width = type_of(result).shape[-1]
    assert isinstance(width, int)
    if VOCABULARY not in graph.options:
        return Vocabulary(width, device)
    return DividedVocabulary(graph.options[VOCABULARY], width, groups, exchange)


def _choose(logits: Tensor, tokens: Tensor, finite: Tensor) -> None:
    top, places = logits.max(dim=-1)
    tokens.copy_(places)
    # Both extremes carry a NaN on: together they are finite exactly when every logit is.
    torch.logical_and(top.isfinite(), logits.amin(dim=-1).isfinite(), out=finite)


def _found(logits: Tensor, first: int, size: int) -> Tensor:
    """For each row of a part whose first column is token ``first`` of ``size``: the largest, its id, and 1 if all are finite;
    f64 ``[R, 3]``."""
    count = min(logits.shape[1], size - first)
    if count <= 0:
        nothing = logits.new_ones(len(logits), 3, dtype=torch.float64)
        nothing[:, 0] = -torch.inf
        return nothing
    own = logits[:, :count]
    top, places = own.max(dim=-1)
    healthy = top.isfinite() & own.amin(dim=-1).isfinite()
    return torch.stack((top.double(), (places + first).double(), healthy.double()), 1)
