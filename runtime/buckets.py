"""The batch sizes that decode steps are padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def decode_buckets(max_batch_size: int) -> list[int]:
    """Ascending sizes up to ``max_batch_size``, which is the last whatever it is.

    Rows of padding cost little next to reading the weights, and each size costs time and memory at the start: so sizes
    lie the farther apart the larger they are.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch_size, 32)]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


def bucket_for(buckets: Sequence[int], count: int) -> int:
    """The smallest bucket that holds ``count`` sequences; there must be one."""
    return buckets[bisect_left(buckets, count)]
