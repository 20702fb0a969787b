"""The tokens that a step chooses: made on the device, read there by the next step, and sent to the host meanwhile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ir.dist import ALONE, Group
from .layout import ALIGNMENT, Layout
from .nccl import NCCLGroup
from .sampler import draw_sampled
from .sequence import SamplingParams
from .vocabulary import Vocabulary


class Chosen(NamedTuple):
    """``tokens`` by row, and whether all ``finite`` logits of the row were."""

    tokens: list[int]
    finite: list[bool]


class Choices:
    """The choices of the last step of at most ``capacity`` rows on the device: ``tokens i64[capacity]``, of a ``vocabulary``.

    A step's choices stand there until the next step's are made. At most two steps' choices may be on their way to the
    host at a time.
    """

    def __init__(
        self, capacity: int, device: torch.device, vocabulary: Vocabulary, store: Tensor | None = None
    ) -> None:
        """``store u8[choices_bytes(...)]`` is memory to use instead of new one; the tokens are at its end."""
        self.vocabulary = vocabulary
        layout = _layout(capacity)
        self._store = torch.zeros(layout.size, dtype=torch.uint8, device=device) if store is None else store
        views = layout.views(self._store)
        self.tokens = views["tokens"]
        self._finite = views["finite"]
        self._hosts = [_Host(layout, device) for _ in range(2)]

    def greedy(self, logits: Tensor) -> None:
        """Choose the most likely token of each row that a model has made ``logits`` of, the lowest id among equals."""
        count = len(logits)
        self.vocabulary.greedy(logits, self.tokens[:count], self._finite[:count])

    def draw(self, logits: Tensor, params: list[SamplingParams], indices: list[int]) -> None:
        """After ``greedy``: draw the tokens of the rows with a temperature instead (see ``sample``)."""
        draw_sampled(logits, params, indices, self.tokens, self.vocabulary)

    def agree(self, group: Group, drawn: bool) -> None:
        """Take the choices of the first rank, if there are several and each has chosen by itself: ``drawn`` says whether some
        rows were."""
        if group.size > 1 and (drawn or not self.vocabulary.together):
            self._store.copy_(group.all_gather(self._store)[0])

    def send(self, count: int, group: Group = ALONE) -> Pending:
        """Copy the first ``count`` choices, those of all in ``group``, to the host, without waiting for them."""
        host = self._hosts.pop(0)
        self._hosts.append(host)
        return host.receive(self._store, count, group)


class Pending:
    """Choices on their way to the host."""

    def __init__(self, host: _Host, count: int, group: Group) -> None:
        self._host = host
        self._count = count
        self._group = group

    def wait(self) -> Chosen:
        """The choices, once they are there.

        Raises:
            RankError: another rank does not do its part.
        """
        return self._host.read(self._count, self._group)


class _Host:
    """Memory of the host that choices are sent to, and the event that they have come."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._store = torch.zeros(layout.size, dtype=torch.uint8, pin_memory=gpu)
        self._views = layout.views(self._store)
        self._event = torch.cuda.Event() if gpu else None  # type: ignore[no-untyped-call]

    def receive(self, store: Tensor, count: int, group: Group) -> Pending:
        self._store.copy_(store, non_blocking=True)
        if self._event is not None:
            self._event.record()
        return Pending(self, count, group)

    def read(self, count: int, group: Group) -> Chosen:
        if isinstance(group, NCCLGroup):
            group.wait(self._event)
        elif self._event is not None:
            self._event.synchronize()
        return Chosen(self._views["tokens"][:count].tolist(), self._views["finite"][:count].tolist())


def choices_bytes(capacity: int) -> int:
    """The size of the ``store`` of ``Choices``."""
    return _layout(capacity).size


def _layout(capacity: int) -> Layout:
    if capacity * 8 % ALIGNMENT:
        raise ValueError(f"a capacity of {capacity} rows leaves a gap behind the tokens")
    return Layout([("finite", torch.bool, (capacity,)), ("tokens", torch.int64, (capacity,))])
