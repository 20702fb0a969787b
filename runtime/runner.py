"""Turns the chunks of a step into tensors, calls the model, and has tokens chosen from what it returns."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..ir.dist import ALONE, Group
from .choices import Choices, Pending
from .decode import DecodeSteps
from .scheduler import Chunk
from .sequence import Sequence
from .step import Model, StepInput, to_device
from .tables import WIDTH_MULTIPLE, BlockTables, table_width
from .vocabulary import Vocabulary


class Flight(NamedTuple):
    """A step that was launched: the ``sequences`` that get a token from it, in order, and the tokens to come."""

    sequences: list[Sequence]
    choices: Pending


class Runner:
    """Calls ``model`` with steps on ``device``, for a cache of blocks of ``block_size`` tokens of a ``vocabulary``.

    Steps of one new token for each sequence go through ``decode``, if there is one.
    """

    def __init__(
        self,
        model: Model,
        block_size: int,
        device: torch.device | str,
        max_batch_size: int,
        max_seq_len: int,
        vocabulary: Vocabulary,
        decode: DecodeSteps | None = None,
        group: Group = ALONE,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.device = torch.device(device)
        self._decode = decode
        self._group = group
        self._tables = BlockTables(max_batch_size, table_width(max_seq_len, block_size))
        capacity = -(-max_batch_size // 8) * 8
        self._choices = decode.static.choices if decode else Choices(capacity, self.device, vocabulary)

    def launch(self, chunks: list[Chunk]) -> Flight:
        """Compute the chunks, and choose a token for each that reaches the end of its sequence.

        Does not wait for the device. Sequences whose last token is not known to the host yet take it from the choices
        of the step launched before.
        """
        sampled = [chunk.sequence for chunk in chunks if chunk.reaches_end]
        if self._decode and len(sampled) == len(chunks) == sum([chunk.length for chunk in chunks]):
            logits = self._decode.run(sampled, self._tables)
        else:
            logits = self.run(chunks)
            if sampled:
                self._choices.greedy(logits)
        drawn = any(sequence.params.temperature > 0 for sequence in sampled)
        if drawn:
            params = [sequence.params for sequence in sampled]
            self._choices.draw(logits, params, [sequence.num_generated for sequence in sampled])
        self._choices.agree(self._group, drawn)
        return Flight(sampled, self._choices.send(len(sampled), self._group))

    def run(self, chunks: list[Chunk], *, all_rows: bool = False) -> torch.Tensor:
        """Compute the chunks and return the model's logits of R rows, in the order of the chunks.

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
        ends = np.fromiter((chunk.reaches_end for chunk in chunks), np.bool_, count)
        rows = np.arange(total) if all_rows else query_starts[1:][ends] - 1
        return StepInput(
            tokens=self._feed(chunks, self._move(np.fromiter(tokens, np.int64, total)), query_starts),
            positions=self._move(positions),
            slots=self._move(slots),
            query_starts=self._move(query_starts.astype(np.int32)),
            context_lens=self._move(contexts.astype(np.int32)),
            block_tables=self._move(block_tables),
            rows=self._move(rows),
        )

    def _feed(self, chunks: list[Chunk], tokens: torch.Tensor, query_starts: npt.NDArray[np.int64]) -> torch.Tensor:
        """Put in the tokens that only the device knows; each is the last of its sequence."""
        unknown = [row for row, chunk in enumerate(chunks) if chunk.sequence.row >= 0 and chunk.reaches_end]
        if not unknown:
            return tokens
        sources = np.fromiter((chunks[row].sequence.row for row in unknown), np.int64, len(unknown))
        places, found = self._move(query_starts[1:][unknown] - 1), self._move(sources)
        return tokens.index_copy_(0, places, self._choices.tokens.index_select(0, found))

    def _block_tables(self, chunks: list[Chunk], contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Blocks [S, B] that hold ``contexts`` tokens. A sequence may own more, for tokens of later steps."""
        places = self._tables.places([chunk.sequence for chunk in chunks])
        used = -(-int(contexts.max()) // self.block_size)
        found: npt.NDArray[np.int32] = self._tables.rows[:, : -(-used // WIDTH_MULTIPLE) * WIDTH_MULTIPLE][places]
        return found

    def _move(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
