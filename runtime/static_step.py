"""The inputs of decode steps at fixed addresses, filled by one copy from the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .choices import Choices, choices_bytes
from .layout import ALIGNMENT, Layout
from .step import StepInput
from .vocabulary import Vocabulary

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


class Staged(NamedTuple):
    """What the host writes for a decode step; row ``s`` is the token of sequence ``s``.

    known     i64[C]    token ids
    sources   i64[C]    the row of the last step whose choice is the token, or ``C + s`` for ``known[s]``
    positions, slots (i64[C]), contexts (i32[C]), tables (i32[C, W])    as in ``StepInput``
    """

    known: Longs
    sources: Longs
    positions: Longs
    slots: Longs
    contexts: Ints
    tables: Ints


class StaticStep:
    """Inputs of decode steps of up to ``max_batch_size`` sequences, and the choices from a ``vocabulary`` that they end with.

    ``width`` is that of the block tables. Rows beyond the sequences of a step are padding: a sequence of one token in
    ``scratch_block``, which belongs to the cache but to no sequence.
    """

    def __init__(
        self,
        max_batch_size: int,
        width: int,
        block_size: int,
        scratch_block: int,
        device: torch.device,
        vocabulary: Vocabulary,
    ) -> None:
        per_line = ALIGNMENT // 8
        self.capacity = capacity = -(-max_batch_size // per_line) * per_line
        self.width = width
        self.device = device
        self.block_size = block_size
        self.scratch_block = scratch_block
        long, short = torch.int64, torch.int32
        layout = Layout(
            [(name, long, (capacity,)) for name in ("known", "sources", "positions", "slots")]
            + [("contexts", short, (capacity,)), ("tables", short, (capacity, width))]
        )
        before = choices_bytes(capacity)
        # The choices lie right before the tokens from the host, so one gather takes each token from where it is.
        store = torch.zeros(before + layout.size, dtype=torch.uint8, device=device)
        self.choices = Choices(capacity, device, vocabulary, store[:before])
        self._inputs = store[before:]
        self._head = layout.offsets["tables"]
        views = layout.views(self._inputs)
        self._feed = store[before - 8 * capacity : before + 8 * capacity].view(long)
        self._sources = views["sources"]
        whole = StepInput(
            tokens=torch.zeros(capacity, dtype=long, device=device),
            positions=views["positions"],
            slots=views["slots"],
            query_starts=torch.arange(capacity + 1, dtype=short, device=device),
            context_lens=views["contexts"],
            block_tables=views["tables"],
            rows=torch.arange(capacity, dtype=long, device=device),
        )
        self._whole = whole
        self._steps: dict[int, StepInput] = {}
        self._stages = [_Stage(layout, device) for _ in range(2)]

    def step(self, size: int) -> StepInput:
        """The inputs of a step of ``size`` sequences; the same tensors at every call."""
        if size not in self._steps:
            parts = {name: value[:size] for name, value in vars(self._whole).items() if name != "query_starts"}
            self._steps[size] = StepInput(query_starts=self._whole.query_starts[: size + 1], **parts)
        return self._steps[size]

    def feed(self, size: int) -> None:
        """Take the tokens of a step from the choices of the last or from the host, as ``sources`` say."""
        torch.index_select(self._feed, 0, self._sources[:size], out=self.step(size).tokens)

    def stage(self) -> Staged:
        """Arrays to write the next step to, then to ``send``. What they hold is that of some earlier step."""
        return self._stages[0].open()

    def pad(self, staged: Staged, count: int, size: int) -> None:
        """Make padding of the rows from ``count`` to ``size``."""
        rows = slice(count, size)
        staged.known[rows] = 0
        staged.sources[rows] = np.arange(self.capacity + count, self.capacity + size)
        staged.positions[rows] = 0
        staged.slots[rows] = self.scratch_block * self.block_size
        staged.contexts[rows] = 1
        staged.tables[rows, 0] = self.scratch_block

    def send(self, size: int, tables: bool) -> None:
        """Copy the staged rows to the device, without waiting; the block tables too, unless they are as before."""
        stage = self._stages.pop(0)
        self._stages.append(stage)
        stage.send(self._inputs, self._head + (size * self.width * 4 if tables else 0))


class _Stage:
    """Memory of the host that a step is written to, and the event that it has been copied."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._store = torch.zeros(layout.size, dtype=torch.uint8, pin_memory=gpu)
        self._arrays = Staged(**{name: view.numpy() for name, view in layout.views(self._store).items()})
        self._event = torch.cuda.Event() if gpu else None  # type: ignore[no-untyped-call]

    def open(self) -> Staged:
        if self._event is not None:
            self._event.synchronize()
        return self._arrays

    def send(self, target: Tensor, size: int) -> None:
        target[:size].copy_(self._store[:size], non_blocking=True)
        if self._event is not None:
            self._event.record()
