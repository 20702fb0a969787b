"""Which tilings of a matmul are tried for how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.graph import type_of
from .columns import Plan
from .coordinates import padded_width
from .weights import in_codes, is_rounded, rows_type, scheme

Tiling = tuple[int, ...]

# What was fastest on an H100 or an H200 for one kernel or another of models of 1 and 7 billion parameters, in bf16.
# Columns, depth and warps, for one row.
_ROW = ((2, 2048, 8), (2, 4096, 4), (4, 1024, 2), (2, 1024, 4), (8, 512, 2), (2, 2048, 2))
# The same where a row of the weight has half or a quarter of the bytes.
_ROW_8 = (
    (4, 4096, 8),
    (4, 4096, 4),
    (8, 1024, 2),
    (2, 2048, 4),
    (8, 4096, 8),
    (8, 2048, 2),
    (4, 2048, 4),
    (4, 2048, 2),
    (8, 1024, 1),
    (16, 2048, 4),
    (16, 4096, 8),
    (8, 2048, 4),
)
_ROW_4 = (
    (8, 2048, 2),
    (8, 4096, 2),
    (4, 4096, 4),
    (8, 4096, 4),
    (4, 2048, 2),
    (8, 1024, 1),
    (4, 4096, 2),
    (16, 1024, 1),
    (8, 2048, 1),
    (16, 2048, 2),
    (16, 4096, 4),
)
# The same for rows and weights in codes of a byte.
_ROW_CODES = (
    (4, 4096, 8),
    (8, 1024, 4),
    (4, 2048, 4),
    (2, 4096, 4),
    (8, 1024, 2),
    (8, 4096, 8),
    (16, 1024, 4),
    (4, 4096, 4),
    (8, 2048, 4),
    (2, 4096, 8),
    (8, 512, 2),
)
# Rows, columns, depth, warps, stages and parts of the depth; and whether the weight's beginning is sent for while the
# kernel in front ends, which helps where that leaves the memory idle.
_FEW = (
    (16, 64, 128, 4, 4, 4),
    (16, 64, 128, 4, 4, 2),
    (16, 64, 128, 4, 6, 1),
    (16, 64, 128, 4, 6, 1, False),
    (16, 64, 128, 4, 6, 2),
    (16, 64, 128, 4, 6, 2, False),
    (16, 64, 128, 4, 3, 1),
    (16, 64, 128, 4, 3, 1, False),
    (16, 128, 128, 8, 4, 1, False),
    (16, 64, 128, 4, 4, 6),
    (64, 128, 64, 4, 4, 2),
    (8, 64, 64, 4, 4, 1, False),
    (16, 64, 64, 4, 6, 1, False),
)
_BROAD = ((64, 64, 64, 4, 4, 1, False), (64, 64, 128, 4, 6, 2, False), (64, 128, 64, 4, 4, 1, False))
# The same for weights of half and a quarter of the bytes.
_FEW_8 = (
    (16, 64, 128, 4, 5, 2),
    (16, 64, 128, 4, 3, 4),
    (16, 128, 128, 4, 3, 4),
    (16, 64, 128, 4, 3, 2),
    (16, 64, 256, 4, 3, 2),
    (16, 64, 128, 4, 3, 1),
    (16, 128, 128, 4, 4, 2),
    (16, 128, 128, 8, 4, 1),
    (8, 128, 128, 4, 4, 1),
    (8, 64, 256, 4, 4, 1),
    (8, 64, 256, 4, 6, 4),
    (8, 128, 256, 4, 6, 4),
    (16, 64, 256, 4, 6, 2),
    (16, 64, 256, 4, 4, 1),
)
_FEW_4 = (
    (16, 64, 256, 4, 3, 4),
    (16, 64, 512, 4, 3, 4),
    (16, 64, 512, 4, 3, 2),
    (16, 64, 256, 4, 5, 1),
    (16, 128, 256, 4, 3, 2),
    (16, 128, 256, 8, 3, 1),
    (16, 64, 256, 4, 3, 2),
    (8, 64, 256, 4, 6, 2),
    (8, 64, 512, 4, 4, 1),
    (8, 64, 256, 4, 6, 6),
    (16, 256, 128, 8, 3, 3),
)
# The same for rows and weights in codes of a byte.
_FEW_CODES = (
    (16, 64, 256, 4, 4, 4),
    (16, 64, 256, 4, 4, 1),
    (16, 64, 256, 4, 4, 2),
    (16, 128, 256, 4, 3, 2),
    (16, 64, 128, 4, 4, 4),
    (16, 64, 512, 4, 3, 2),
    (16, 128, 128, 4, 4, 1, False),
    (16, 64, 256, 4, 6, 2, False),
    (16, 64, 128, 4, 6, 1, False),
    (16, 64, 256, 4, 3, 1, False),
)
_BROAD_CODES = (
    (64, 128, 128, 8, 4, 1),
    (64, 128, 128, 8, 3, 1),
    (64, 64, 128, 4, 5, 1),
    (64, 128, 128, 8, 5, 2),
    (64, 64, 256, 4, 3, 2),
    (64, 64, 256, 4, 3, 1),
    (64, 128, 128, 4, 4, 2),
    (64, 128, 128, 4, 4, 1),
    (64, 64, 256, 4, 3, 4),
)
_BROAD_8 = (
    (64, 64, 128, 4, 3, 2),
    (64, 64, 128, 4, 3, 1),
    (64, 64, 128, 4, 3, 4),
    (64, 128, 128, 4, 3, 4),
    (64, 128, 128, 8, 3, 1),
    (64, 128, 128, 8, 3, 2),
    (64, 128, 64, 8, 4, 1),
    (64, 128, 128, 4, 4, 1),
    (64, 64, 128, 4, 4, 2),
    (64, 64, 128, 4, 6, 2),
)
_BROAD_4 = (
    (64, 64, 256, 4, 3, 2),
    (64, 64, 256, 4, 3, 1),
    (64, 64, 256, 4, 3, 4),
    (64, 128, 256, 4, 3, 2),
    (64, 128, 256, 8, 3, 1),
    (64, 128, 256, 8, 3, 2),
    (64, 128, 128, 8, 4, 1),
    (64, 128, 128, 4, 3, 1),
    (64, 128, 128, 8, 6, 4),
    (64, 64, 128, 4, 6, 2),
)
# Rows, columns, depth, warps and stages.
_NARROW = ((16, 16, 512, 2, 5), (16, 32, 256, 4, 4), (16, 64, 128, 2, 5))
_SOME = ((64, 32, 256, 4, 4), (64, 128, 128, 8, 4), (64, 16, 256, 4, 4), (64, 32, 128, 4, 3))
_MANY = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (128, 256, 64, 8, 4))
_NARROW_CODES = ((16, 32, 256, 4, 4), (16, 64, 128, 4, 4))
_SOME_CODES = (
    (64, 64, 256, 4, 3),
    (64, 32, 256, 4, 5),
    (64, 32, 512, 4, 4),
    (64, 64, 256, 4, 5),
    (64, 128, 128, 4, 4),
    (64, 32, 256, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 32, 256, 4, 6),
    (64, 128, 128, 4, 6),
)
_MANY_CODES = ((128, 128, 128, 8, 3), (128, 64, 128, 8, 4), (128, 256, 64, 8, 4))


@dataclass(frozen=True)
class _Likely:
    """What is tried: for one row, for up to 16, for up to 64 with the depth in parts, and tiles for few, some and many."""

    row: Sequence[Tiling]
    few: Sequence[Tiling]
    broad: Sequence[Tiling]
    narrow: Sequence[Tiling] = _NARROW
    some: Sequence[Tiling] = _SOME
    many: Sequence[Tiling] = _MANY


_PLAIN = _Likely(_ROW, _FEW, _BROAD)
_BYTES = _Likely(_ROW_8, _FEW_8, _BROAD_8)
_NIBBLES = _Likely(_ROW_4, _FEW_4, _BROAD_4)
_CODES = _Likely(_ROW_CODES, _FEW_CODES, _BROAD_CODES, _NARROW_CODES, _SOME_CODES, _MANY_CODES)


def _likely(layout: Plan) -> _Likely:
    if in_codes(layout):
        return _CODES
    return _NIBBLES if _nibbles(layout) else _BYTES if is_rounded(layout) else _PLAIN


def row_tilings(layout: Plan) -> list[Tiling]:
    """``(BLOCK_N, BLOCK_K, num_warps)`` for one row, the likeliest to be fast first."""
    wide = weight_bytes(layout) > 2
    deepest = padded_width(layout.depth)
    found: list[Tiling] = []
    for block_n, block_k, warps in _likely(layout).row:
        block_k = min(deepest, block_k // (2 if wide else 1))
        tiling = (max(2, block_n // layout.lanes), block_k, warps)
        # Unrolled loops: a few turns keep the kernel small.
        if tiling not in found and -(-layout.depth // block_k) <= 16:
            found.append(tiling)
    if is_rounded(layout):
        found = [_whole_blocks(layout, *tiling) for tiling in found]
    return list(dict.fromkeys(found)) or [(2, min(deepest, 4096), 4)]


def _whole_blocks(layout: Plan, columns: int, depth: int, warps: int) -> Tiling:
    """A tiling in which each thread has eight words, and so the row as it has the weight; turns take whole blocks."""
    how = scheme(layout)
    return columns, max(how.block, depth), max(1, min(warps, depth // (32 * 8 * how.places)))


def few_tilings(layout: Plan, likely: Sequence[Tiling]) -> list[Tiling]:
    """``(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, SPLITS)`` for a few rows, the likeliest first; after them False
    where nothing is sent for early."""
    if weight_bytes(layout) > 2:
        return [(16, 32, max(64, _shallowest(layout)), 4, 3, 1)]
    most, deepest = _widest(layout), padded_width(layout.depth)
    found: list[Tiling] = []
    for m, columns, k, warps, stages, splits, *early in likely:
        n = max(16, min(columns // layout.lanes, most))
        # Each part of a sum has a few turns.
        if splits == 1 or layout.depth >= 2 * splits * k:
            found.append((m, n, max(_shallowest(layout), min(k, deepest)), warps, stages, splits, *early))
    return list(dict.fromkeys(found))


def tile_tilings(layout: Plan) -> list[list[Tiling]]:
    """``(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)`` for few, some and many rows, the likeliest first."""
    if weight_bytes(layout) > 2:
        broad = max(16, min(64, padded_width(layout.head_dim))) if layout.head_dim else 64
        deep = max(32, _shallowest(layout))
        return [[], [(32, broad, deep, 8, 2)], [(32, broad, deep, 8, 2)]]
    found: list[list[Tiling]] = []
    likely = _likely(layout)
    for tilings in (likely.narrow, likely.some, likely.many):
        fitting = [
            (m, max(16, min(columns // layout.lanes, _widest(layout))), max(k, _shallowest(layout)), warps, stages)
            for m, columns, k, warps, stages in tilings
        ]
        found.append(list(dict.fromkeys(fitting)))
    return found


def _shallowest(layout: Plan) -> int:
    """The least depth of a turn of small matrix products: whole groups and blocks, and 16 codes of each place."""
    if in_codes(layout):
        return 32  # the tensor cores take as many bytes at a time
    how = scheme(layout) if is_rounded(layout) else None
    return max(16 * how.places, how.group, how.block) if how else 16


def _widest(layout: Plan) -> int:
    """The most columns of a tile."""
    return padded_width(layout.head_dim) if layout.head_dim else 256


def tilings_of(layout: Plan) -> list[tuple[int | None, str, list[Tiling]]]:
    """The tilings for up to so many rows, and the function of the file that makes each of them."""
    narrow, some, many = tile_tilings(layout)
    few, broad = _likely(layout).few, _likely(layout).broad
    up_to_64 = [(64, "tile", some), (64, "few", few_tilings(layout, broad))]
    if is_rounded(layout) or in_codes(layout):
        up_to_64.reverse()
    elif weight_bytes(layout) > 2:
        up_to_64.pop()
    return [
        (1, "row", row_tilings(layout)),
        (16, "few", few_tilings(layout, few)),
        (16, "tile", narrow),
        *up_to_64,
        (None, "tile", many),
    ]


def _nibbles(layout: Plan) -> bool:
    """Whether codes have 4 bits."""
    return is_rounded(layout) and scheme(layout).bits == 4


def weight_bytes(layout: Plan) -> int:
    """The size of an element of the weight, as it is multiplied."""
    kind = rows_type(layout) if is_rounded(layout) else type_of(layout.weight)
    return kind.torch_dtype.itemsize
