"""Turns the chunks of a step into tensors and calls the model."""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from .scheduler import Chunk
from .step import Model, StepInput, to_device

BLOCK_TABLE_MULTIPLE = 8
"""Widths of block tables are multiples of this, so that a model sees few distinct shapes."""


class Runner:
    """Calls ``model`` with steps on ``device``, for a cache of blocks of ``pool_block_size`` tokens."""

    def __init__(self, model: Model, pool_block_size: int, device: torch.device | str) -> None:
        self.model = model
        self.block_size = pool_block_size
        self.device = torch.device(device)

    def run(self, chunks: list[Chunk], *, all_rows: bool = False) -> torch.Tensor:
        """Compute the chunks and return logits [R, V], in the order of the chunks.

        R counts the chunks that reach the end of their sequence, or all tokens if ``all_rows``.
        """
        with torch.no_grad():
            return self.model(self.prepare(chunks, all_rows=all_rows))

    def prepare(self, chunks: list[Chunk], *, all_rows: bool = False) -> StepInput:
        """The step that computes the chunks; they must have their blocks."""
        count = len(chunks)
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
        lengths = np.fromiter((chunk.length for chunk in chunks), np.int64, count)
        contexts = starts + lengths
        query_starts = np.zeros(count + 1, np.int64)
        np.cumsum(lengths, out=query_starts[1:])
        total = int(query_starts[-1])

        block_tables = self._block_tables(chunks, contexts)
        owners = np.repeat(np.arange(count), lengths)
        positions = np.arange(total) - (query_starts[:-1] - starts)[owners]
        blocks = block_tables[owners, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size

        tokens = chain.from_iterable(chunk.sequence.slice_tokens(chunk.start, chunk.stop) for chunk in chunks)
        if all_rows:
            rows = np.arange(total)
        else:
            ends = np.fromiter((chunk.reaches_end for chunk in chunks), np.bool_, count)
            rows = query_starts[1:][ends] - 1
        return StepInput(
            tokens=self._move(np.fromiter(tokens, np.int64, total)),
            positions=self._move(positions),
            slots=self._move(slots),
            query_starts=self._move(query_starts.astype(np.int32)),
            context_lens=self._move(contexts.astype(np.int32)),
            block_tables=self._move(block_tables),
            rows=self._move(rows),
        )

    def _block_tables(self, chunks: list[Chunk], contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Blocks [S, B] that hold ``contexts`` tokens. A sequence may own more, for tokens of later steps."""
        used = (-(-contexts // self.block_size)).tolist()
        width = -(-max(used) // BLOCK_TABLE_MULTIPLE) * BLOCK_TABLE_MULTIPLE
        tables = np.zeros((len(chunks), width), np.int32)
        for row, (chunk, blocks) in enumerate(zip(chunks, used, strict=True)):
            tables[row, :blocks] = chunk.sequence.block_table[:blocks]
        return tables

    def _move(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
