"""Decode steps: one token of each sequence, padded to one of a few sizes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from .buckets import bucket_for, decode_buckets
from .replay import GraphReplay, Replay
from .sequence import Sequence
from .static_step import Longs, Staged, StaticStep
from .step import StepInput
from .tables import BlockTables
from .timing import median_milliseconds

Forward = Callable[[StepInput, Tensor], None]
"""Writes the keys and values of the step's tokens to the cache, and the logits of its rows to a tensor [R, columns]."""


class DecodeSteps:
    """Computes decode steps of up to ``max_batch_size`` sequences on static inputs and chooses greedy tokens.

    ``replay`` does what ``compute`` does, and may be set to something faster.
    """

    def __init__(self, forward: Forward, static: StaticStep, max_batch_size: int, logits: Tensor) -> None:
        """``logits [max_batch_size, columns]`` is memory for the results, of the model's type."""
        self.static = static
        self.buckets = decode_buckets(max_batch_size)
        self._forward = forward
        self._logits = logits
        self.replay: Replay = self.compute
        self._last: tuple[BlockTables, int, int, bytes] | None = None
        self._blank(max_batch_size)

    def run(self, sequences: SequenceOf[Sequence], tables: BlockTables) -> Tensor:
        """Compute the next token of each sequence, which must have its block; returns the model's logits.

        The logits stand until the next run. The greedy tokens are in ``static.choices``.
        """
        count = len(sequences)
        bucket = bucket_for(self.buckets, count)
        staged = self.static.stage()
        places = self._fill(staged, sequences, tables)
        self.static.pad(staged, count, bucket)
        # Most steps of few sequences go on in the blocks that the device knows of already.
        state = (tables, tables.changes, bucket, places.tobytes())
        moved = state != self._last
        if moved:
            width = int(staged.contexts[:count].max() - 1) // self.static.block_size + 1
            staged.tables[:count, :width] = tables.rows[:, :width][places]
        self.static.send(bucket, moved)
        self._last = state
        self.replay(bucket)
        return self._logits[:count]

    def milliseconds(self, batch: int, context: int, repeats: int) -> float:
        """Median time of ``replay`` for ``batch`` sequences with ``context`` tokens each: by the device's clock on a GPU.

        Random tokens are fed, what the cache holds is read as a batch would, and only the scratch block is written to.
        """
        static, size = self.static, bucket_for(self.buckets, batch)
        blocks = -(-context // static.block_size)
        staged = static.stage()
        static.pad(staged, 0, size)
        staged.known[:batch] = np.random.default_rng(0).integers(0, static.choices.vocabulary.size, batch)
        staged.positions[:batch] = context - 1
        staged.contexts[:batch] = context
        staged.tables[:batch, :blocks] = np.arange(batch * blocks).reshape(batch, blocks) % max(1, static.scratch_block)
        static.send(size, tables=True)
        self._last = None
        return median_milliseconds(lambda: self.replay(size), repeats, static.device)

    def close(self) -> None:
        """Let go of what was recorded; steps are plain calls again."""
        if isinstance(self.replay, GraphReplay):
            self.replay.close()
        self.replay = self.compute

    def _fill(self, staged: Staged, sequences: SequenceOf[Sequence], tables: BlockTables) -> Longs:
        """Write the rows of the sequences, all but their block tables; returns where those stand."""
        count, block_size = len(sequences), self.static.block_size
        places = tables.places(sequences)
        positions = np.array([item.num_computed for item in sequences], np.int64)
        staged.positions[:count] = positions
        staged.contexts[:count] = positions + 1
        columns = positions // block_size
        staged.slots[:count] = tables.rows[places, columns].astype(np.int64) * block_size + positions % block_size
        sources = np.array([item.row for item in sequences], np.int64)
        here = np.flatnonzero(sources < 0)
        if len(here):
            staged.known[here] = [sequences[row].last_token for row in here.tolist()]
            sources[here] = self.static.capacity + here
        staged.sources[:count] = sources
        return places

    def compute(self, size: int) -> None:
        """Run the step on the device's inputs as they are; ``size`` is one of ``buckets``."""
        with torch.inference_mode():
            self.static.feed(size)
            logits = self._logits[:size]
            self._forward(self.static.step(size), logits)
            self.static.choices.greedy(logits)

    def _blank(self, size: int) -> None:
        """Send a step of padding alone."""
        self.static.pad(self.static.stage(), 0, size)
        self.static.send(size, tables=True)
        self._last = None
