"""How kernels of several ranks meet: each writes what it has into memory of all, and waits for what the others wrote.

Every 32 bits travel in one word of 64 with the number of the meeting, so that a word says itself whether it has come (as in
the low-latency protocol of NCCL): nothing is ordered by fences, and a kernel may wait before those in front have ended. There
are four places for each word: two for the meetings of a step in turn, and two for those of the next step. Who writes to one
again has seen what all wrote to another since, so all have read what it held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dist import Mirror, ranks_of
from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from ..ir.tiles import TILE_MEETINGS, WIDEST_ROW
from .coordinates import TILE, padded_width

SENDING = {
    "ranks_ptr": "*i64",
    "steps_ptr": "*i32",
    "rank": "i32",
    "number": "i32",
    "meetings": "i32",
    "stride": "i32",
    "slot": "i32",
}
"""The parameters of a kernel that sends, and their types."""
MEETING = {"mine_ptr": "*i64", **SENDING}
"""The parameters of a kernel that receives."""
NOT_SENT = {**dict.fromkeys(SENDING), "SEND": False}
"""The arguments of a kernel that may send, and does not."""
UNSPECIALISED = ("rank", "number", "meetings")
"""Those of the parameters that no kernel is compiled for a value of."""
PLACES = 4
"""How many places there are for each word."""

HELPERS = {
    "packed": """@triton.jit
def packed(x, KIND: tl.constexpr):
    # Numbers as 32 bits each, or pairs of neighbours where they have 16.
    if KIND == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(x.to(KIND).to(tl.int16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
        bits = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return bits
""",
    "unpacked": """@triton.jit
def unpacked(bits, KIND: tl.constexpr):
    if KIND == tl.float32:
        x = bits.to(tl.float32, bitcast=True)
    else:
        low, high = (bits & 0xFFFF).to(tl.int16), (bits >> 16).to(tl.int16)
        pairs = tl.join(low.to(KIND, bitcast=True), high.to(KIND, bitcast=True))
        x = tl.reshape(pairs, (bits.shape[0], bits.shape[1] * 2)).to(tl.float32)
    return x
""",
    "send_to_ranks": """@triton.jit
def send_to_ranks(
    x, line, line_ok, col, tag, turn, ranks_at, rank, stride, slot, KIND: tl.constexpr, WIDTH: tl.constexpr
):
    # A tile of whole pairs to the memory of all ranks, this one's as well.
    bits = packed(x, KIND)
    PER: tl.constexpr = x.shape[1] // bits.shape[1]
    if PER == 2:
        col, _ = tl.split(tl.reshape(col, (1, bits.shape[1], 2)))
    place = (turn * len(ranks_at) + rank) * stride + line * slot
    word = (bits.to(tl.int64) & 0xFFFFFFFF) | (tag.to(tl.int64) << 32)
    for peer in tl.static_range(len(ranks_at)):
        theirs = ranks_at[peer].to(tl.pointer_type(tl.int64))
        tl.store(theirs + place + col // PER, word, mask=line_ok & (col < WIDTH))
""",
    "await_word": """@triton.jit
def await_word(pointer, tag):
    # One word after the other is cheap to wait for: what sends may run on the same processor.
    while (tl.load(pointer, volatile=True) >> 32).to(tl.int32) != tag:
        pass
""",
    "sum_of_ranks": """@triton.jit
def sum_of_ranks(
    line, line_ok, tag, turn, mine_ptr, stride, slot,
    RANKS: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):
    # The sum of the rows that the ranks have sent, in the order of the ranks: every rank gets the same bits.
    PER: tl.constexpr = 1 if KIND == tl.float32 else 2
    column = tl.arange(0, PADDED // PER)[None, :]
    wanted = line_ok & (column * PER < WIDTH)
    total = tl.zeros((line.shape[0], PADDED), tl.float32)
    for source in tl.static_range(RANKS):
        place = (turn * RANKS + source) * stride
        await_word(mine_ptr + place + tl.program_id(0) * line.shape[0] * slot + (WIDTH - 1) // PER, tag)
        pointers = mine_ptr + place + line * slot + column
        found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        while tl.max((wanted & ((found >> 32).to(tl.int32) != tag)).to(tl.int32)) > 0:
            found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        total += unpacked(found.to(tl.int32), KIND)
    return total
""",
}

FEW_ROWS = 8
"""Up to so many rows are sent from the kernel that makes them; for more, a kernel that has them whole is faster."""
LINES = 128
"""How many rows of a value may meet those of other ranks."""


@dataclass(frozen=True)
class Places:
    """The memory of one rank's exchange: for ``lines`` rows, of ``slot`` numbers at most, from each of the ranks.

    A step has at most ``meetings``.
    """

    ranks: int
    slot: int
    meetings: int = 2
    lines: int = LINES

    @property
    def words(self) -> int:
        """Numbers of 64 bits."""
        return PLACES * self.ranks * self.stride

    @property
    def stride(self) -> int:
        """Those that one rank writes to for a meeting."""
        return self.lines * self.slot


class Exchange(ABC):
    """What launchers need so that their kernels meet those of other ranks: all do so in the same order.

    ``mine i64[places.words]`` is memory that all ranks write to, all zeros, and ``addresses`` are those of all ranks'.
    """

    def __init__(self, places: Places, mine: Tensor, addresses: Sequence[int], rank: int) -> None:
        self.places = places
        self._steps = torch.zeros(1, dtype=torch.int32, device=mine.device)
        self._number = 0
        ranks_at = torch.tensor(addresses, dtype=torch.int64, device=mine.device)
        self._mine = {"mine_ptr": mine}
        self._fixed: dict[str, Any] = {"ranks_ptr": ranks_at, "steps_ptr": self._steps, "rank": rank}
        self._fixed |= {"meetings": places.meetings, "stride": places.stride, "slot": places.slot}

    def begin(self) -> None:
        """A step begins: its meetings are others than those of the last."""
        self._steps.add_(1)
        self._number = 0

    def next(self) -> None:
        """What is sent from here on is for the next meeting."""
        if self._number == self.places.meetings:
            self.begin()
        self._number += 1

    def answer(self) -> None:
        """Write what kernels of the step under way wait for, in place of ranks that are gone; the numbers mean nothing.

        For a stream of its own: those kernels keep theirs waiting.
        """
        meetings, words = self.places.meetings, self._mine["mine_ptr"]
        first = int(self._steps.item()) * meetings
        for tag in range(first, first + meetings + 1):
            words.fill_(((tag + 2**31) % 2**32 - 2**31) << 32)

    @property
    def sending(self) -> dict[str, Any]:
        """The arguments for the parameters ``SENDING``."""
        return {**self._fixed, "number": self._number, "SEND": True}

    @property
    def meeting(self) -> dict[str, Any]:
        """The arguments for the parameters ``MEETING``."""
        return {**self._mine, **self._fixed, "number": self._number}

    def takes(self, rows: int, width: int, nbytes: int) -> bool:
        """Whether so many rows, ``nbytes`` in all, meet this way. Who sends and who receives ask the same."""
        return rows <= self.places.lines and width <= self.places.slot

    def holds(self, words: int) -> bool:
        """Whether so many words from each rank are gathered this way."""
        return words <= self.places.stride

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what is larger; may be written over ``x``."""


class MirrorExchange(Exchange):
    """The exchange of a rank whose others have just what it has: what it would write to theirs it writes for them to its own.

    So kernels run by themselves, on any device and in the interpreter, as they do among ranks.
    """

    def __init__(self, places: Places, device: torch.device | str) -> None:
        mine = torch.zeros(places.words, dtype=torch.int64, device=device)
        step = places.stride * mine.itemsize
        super().__init__(places, mine, [mine.data_ptr() + peer * step for peer in range(places.ranks)], 0)

    def all_reduce(self, x: Tensor) -> Tensor:
        return Mirror(self.places.ranks).all_reduce(x)


def places_for(graph: Graph, meetings: int = 2) -> Places:
    """Room for all sums over ranks in a graph, of which there are so many in a step."""
    widths = [type_of(node).shape[-1] for node in graph.calls() if op_name(node.target) in TILE_MEETINGS]
    rows = [padded_width(width) for width in widths if isinstance(width, int) and width <= WIDEST_ROW]
    return Places(ranks_of(graph), max([TILE, *rows]), meetings + meetings % 2)


def meeting_of(graph: Graph) -> Node | None:
    """The sum over ranks in a kernel's region, of which there is one at most."""
    return next((node for node in graph.calls() if op_name(node.target) in TILE_MEETINGS), None)


def sent_by(graph: Graph) -> Node | None:
    """What a kernel sends to other ranks, if it does."""
    return next((node for node in graph.calls() if op_name(node.target) == "dist.send"), None)
