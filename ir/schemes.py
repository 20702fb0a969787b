"""Schemes of quantised matrices: how a row is held in few bits.

A row is one run of bytes: its codes, then its factors in fp32, then (asymmetric schemes) its zero points of a byte,
and nothing up to a multiple of 16 bytes, or of 64 or 128 where that adds little: of rows that begin between two cache
lines a tile reads a line more each, which costs a quarter of a product's speed. Each row has its own factors, so that
rows are cut and joined like those of any matrix. Codes stand in blocks of up to 32 words of 16 bits, ``n`` say: word ``i``
of a block holds its codes ``i`` and ``i + n`` if they have 8 bits, ``i``, ``i + n``, ``i + 2n`` and ``i + 3n`` if they
have 4, the first in the lowest bits. The codes of one place in words that follow each other so belong to inputs that
follow each other. The more do, the fewer pieces the rows are read in: with 8 a product with 64 rows took twice as long.

The dynamic schemes are for both operands of a product: the rows of its weight, and the rows of its activations, which
are rounded in each step. Their codes stand one after another, in a byte each, as the tensor cores take them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_NAME = re.compile(r"int8d?|fp8|(?:int8|u?int4)g(32|64|128)")
_ALIGNMENT = 16
# Words in a block at most: as many numbers of 16 bits are two sectors of memory.
_RUN = 32
# At most this part of a row is left empty to have rows begin at cache lines.
_SPARE = 32
ALIASES = {"int4": "int4g128", "int8-dynamic": "int8d"}
"""Names that a caller may use for schemes which have others in types."""
NAMES = tuple(
    "int8 int8g128 int8g64 int8g32 int4 int4g128 int4g64 int4g32 uint4g128 uint4g64 uint4g32 int8-dynamic fp8".split()
)
"""What a caller may ask for."""


@dataclass(frozen=True)
class Scheme:
    """``bits`` a code; ``group`` codes of a row share a factor (0: all of it); ``zeros``: they share a zero point, too.

    ``dynamic``: activations are rounded as well. ``floats``: codes are E4M3 numbers instead of whole ones.
    """

    name: str
    bits: int
    group: int
    zeros: bool
    dynamic: bool = False
    floats: bool = False

    @property
    def places(self) -> int:
        """Codes in a word."""
        return 16 // self.bits

    @property
    def middle(self) -> int:
        """What is added to a code where it stands: none is negative there."""
        return 0 if self.zeros or self.dynamic else 1 << self.bits - 1

    @property
    def largest(self) -> float:
        """The largest magnitude of a code of 8 bits."""
        return 448.0 if self.floats else 127.0

    @property
    def run(self) -> int:
        """Words that follow each other in a block, in each place of which are codes that follow each other.

        What is multiplied with one place of them is read in pieces of as many numbers.
        """
        return min(_RUN, self.group // self.places) if self.group else _RUN

    @property
    def block(self) -> int:
        """Codes in a block: those of the first place of all its words, then those of the next."""
        return self.run * self.places

    def groups(self, depth: int) -> int:
        """Factors of a row of ``depth`` codes."""
        return depth // self.group if self.group else 1

    def factors_at(self, depth: int) -> int:
        """Where the factors of a row begin, in bytes."""
        whole = 1 if self.dynamic else self.block
        return _aligned(-(-depth // whole) * whole * self.bits // 8)

    def zeros_at(self, depth: int) -> int:
        """Where the zero points of a row begin, in bytes."""
        return self.factors_at(depth) + 4 * self.groups(depth)

    def row_bytes(self, depth: int) -> int:
        """The length of a row of ``depth`` codes in bytes."""
        size = self.zeros_at(depth) + (self.groups(depth) if self.zeros else 0)
        for line in (128, 64):
            if -size % line <= size // _SPARE:
                return size + -size % line
        return _aligned(size)

    def reason_against(self, depth: int) -> str:
        """Why rows of that length cannot be held; empty if they can."""
        if self.group and depth % self.group:
            return f"rows of {depth} are no multiple of the group of {self.group}"
        return ""


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


@cache
def scheme_of(name: str) -> Scheme | None:
    """The scheme of an element type; ``None`` for types that are not quantised."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    dynamic = name in ("int8d", "fp8")
    return Scheme(name, 4 if "int4" in name else 8, int(match[1] or 0), name.startswith("u"), dynamic, name == "fp8")
