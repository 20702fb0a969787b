"""Block tables of the sequences that run, as rows of one array that is kept up to date instead of built at every step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sequence import Sequence

WIDTH_MULTIPLE = 8
"""Widths of block tables are multiples of this, so that a model sees few distinct shapes."""


def table_width(num_tokens: int, block_size: int) -> int:
    """Blocks in a row of a block table for up to ``num_tokens`` tokens."""
    return -(-num_tokens // (block_size * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


@dataclass(slots=True)
class _Entry:
    """A sequence's row, and what of its table stands there: ``count`` blocks of its admission number ``admission``."""

    place: int
    admission: int
    count: int


class BlockTables:
    """``rows i32[capacity, width]``: a row holds the blocks of a sequence in order; what lies past them is anything."""

    def __init__(self, capacity: int, width: int) -> None:
        self.rows: npt.NDArray[np.int32] = np.zeros((capacity, width), np.int32)
        self._known: dict[Sequence, _Entry] = {}
        self._free = list(range(capacity))
        self.changes = 0
        """Counts the times that rows were written."""

    def places(self, sequences: SequenceOf[Sequence]) -> npt.NDArray[np.int64]:
        """The row of each of at most ``capacity`` sequences, brought up to date."""
        known = self._known
        found = []
        for sequence in sequences:
            entry = known.get(sequence)
            if entry is None:
                entry = self._enter(sequence, sequences)
            elif entry.admission != sequence.admissions:
                entry.admission, entry.count = sequence.admissions, 0
            if entry.count != len(sequence.block_table):
                blocks = sequence.block_table[entry.count :]
                self.rows[entry.place, entry.count : entry.count + len(blocks)] = blocks
                entry.count += len(blocks)
                self.changes += 1
            found.append(entry.place)
        return np.array(found, np.int64)

    def _enter(self, sequence: Sequence, wanted: SequenceOf[Sequence]) -> _Entry:
        if not self._free:
            kept = set(wanted)
            for other in [item for item in self._known if item not in kept]:
                self._free.append(self._known.pop(other).place)
        entry = self._known[sequence] = _Entry(self._free.pop(), sequence.admissions, 0)
        return entry
