"""The blocks of the paged KV cache: which are free, which are owned. Knows nothing of sequences or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ir.errors import FuselineError


class PoolError(FuselineError, RuntimeError):
    """The accounts of the KV cache are broken: a defect of the runtime, never of a request."""


class BlockPool:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each; O(1) a block.

    Blocks freed last are handed out first: they are the likeliest to be in a cache of the device.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, n: int) -> bool:
        return n <= len(self._free)

    def allocate(self, n: int) -> list[int]:
        """``n`` blocks that nobody owns. Raises PoolError, and takes none, if there are fewer."""
        if not 0 <= n <= len(self._free):
            raise PoolError(f"cannot allocate {n} blocks: {len(self._free)} of {self.num_blocks} are free")
        split = len(self._free) - n
        blocks = self._free[split:][::-1]
        del self._free[split:]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises PoolError at the first that is not owned: freed twice, or never handed out."""
        for block in blocks:
            if not 0 <= block < self.num_blocks or not self._owned[block]:
                raise PoolError(f"block {block} is freed but not owned (the pool has {self.num_blocks} blocks)")
            self._owned[block] = 0
            self._free.append(block)

    def check_integrity(self, live_block_tables: Iterable[Sequence[int]]) -> None:
        """Raise PoolError unless every block is either free, once, or in exactly one live table, once."""
        holders = [0] * self.num_blocks
        for table in live_block_tables:
            for block in table:
                if not 0 <= block < self.num_blocks:
                    raise PoolError(f"a block table holds block {block}; the pool has {self.num_blocks} blocks")
                holders[block] += 1
        free = [0] * self.num_blocks
        for block in self._free:
            free[block] += 1
        for block in range(self.num_blocks):
            if free[block] + holders[block] != 1 or self._owned[block] != holders[block]:
                raise PoolError(
                    f"block {block} is {free[block]} times free and in {holders[block]} live block tables, "
                    f"and marked as {'owned' if self._owned[block] else 'free'}"
                )
