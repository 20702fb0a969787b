"""How kernels of several ranks meet: each writes what it has into memory of all, and waits for what the others wrote.

Every 32 bits travel in one word of 64 with the number of the meeting, so that a word says itself whether it has come (as in
the low-latency protocol of NCCL): nothing is ordered by fences. A row of a value has a line of words, and counts its meetings
by itself. There are two places for each word, taken in turn: who writes to one for the second time has seen what all wrote to
the other since, so all have read what it held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dist import Mirror
from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from ..ir.tiles import TILE_MEETINGS, WIDEST_ROW
from .coordinates import TILE, padded_width

SENDING = {"ranks_ptr": "*i64", "epochs_ptr": "*i32", "rank": "i32", "lines": "i32", "slot": "i32"}
"""The parameters of a kernel that sends, and their types."""
MEETING = {"mine_ptr": "*i64", **SENDING}
"""The parameters of a kernel that receives."""
NOT_SENT = {"ranks_ptr": None, "epochs_ptr": None, "rank": None, "lines": None, "slot": None, "SEND": False}
"""The arguments of a kernel that may send, and does not."""

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
def send_to_ranks(x, row, row_ok, col, epoch, ranks_at, rank, lines, slot, KIND: tl.constexpr, WIDTH: tl.constexpr):
    # A tile of whole pairs to the memory of all ranks, this one's as well.
    bits = packed(x, KIND)
    PER: tl.constexpr = x.shape[1] // bits.shape[1]
    if PER == 2:
        col, _ = tl.split(tl.reshape(col, (1, bits.shape[1], 2)))
    place = ((epoch & 1).to(tl.int64) * len(ranks_at) + rank) * lines + row
    word = (bits.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    for peer in tl.static_range(len(ranks_at)):
        theirs = ranks_at[peer].to(tl.pointer_type(tl.int64))
        tl.store(theirs + place * slot + col // PER, word, mask=row_ok & (col < WIDTH))
""",
    "sum_of_ranks": """@triton.jit
def sum_of_ranks(
    row, row_ok, epoch, mine_ptr, epochs_ptr, lines, slot,
    RANKS: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):
    # The sum of the rows that the ranks have sent, in the order of the ranks: every rank gets the same bits.
    PER: tl.constexpr = 1 if KIND == tl.float32 else 2
    column = tl.arange(0, PADDED // PER)[None, :]
    wanted = row_ok & (column * PER < WIDTH)
    total = tl.zeros((row.shape[0], PADDED), tl.float32)
    for source in tl.static_range(RANKS):
        place = ((epoch & 1).to(tl.int64) * RANKS + source) * lines + row
        pointers = mine_ptr + place * slot + column
        found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        while tl.max((wanted & ((found >> 32).to(tl.int32) != epoch)).to(tl.int32)) > 0:
            found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        total += unpacked(found.to(tl.int32), KIND)
    tl.store(epochs_ptr + row, epoch, mask=row_ok)
    return total
""",
}

LINES = 256
"""How many rows of a value may meet those of other ranks."""


@dataclass(frozen=True)
class Places:
    """The memory of one rank's exchange: for ``lines`` rows, of ``slot`` numbers at most, from each of the ranks."""

    ranks: int
    slot: int
    lines: int = LINES

    @property
    def words(self) -> int:
        """Numbers of 64 bits."""
        return 2 * self.ranks * self.lines * self.slot

    def hold(self, rows: int, width: int) -> bool:
        return rows <= self.lines and width <= self.slot


class Exchange(Protocol):
    """What launchers need so that their kernels meet those of other ranks.

    ``meeting`` and ``sending`` are the arguments for the parameters of these names.
    """

    meeting: dict[str, Any]
    sending: dict[str, Any]

    def takes(self, rows: int, width: int, nbytes: int) -> bool:
        """Whether so many rows, ``nbytes`` in all, meet this way. Who sends and who receives ask the same."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what is larger; may be written over ``x``."""


class MirrorExchange:
    """The exchange of a rank whose others have just what it has: what it would write to theirs it writes for them to its own.

    So kernels run by themselves, on any device and in the interpreter, as they do among ranks.
    """

    def __init__(self, places: Places, device: torch.device | str) -> None:
        self._places, self._group = places, Mirror(places.ranks)
        mine = torch.zeros(places.words, dtype=torch.int64, device=device)
        step = places.lines * places.slot * mine.itemsize
        addresses = [mine.data_ptr() + peer * step for peer in range(places.ranks)]
        self.meeting, self.sending = arguments_of(places, mine, addresses, 0)

    def takes(self, rows: int, width: int, nbytes: int) -> bool:
        return self._places.hold(rows, width)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)


def arguments_of(
    places: Places, mine: Tensor, addresses: Sequence[int], rank: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``meeting`` and ``sending`` of an exchange: ``mine i64[places.words]``, all zeros, and the addresses of all ranks'."""
    ranks_at = torch.tensor(addresses, dtype=torch.int64, device=mine.device)
    epochs = torch.zeros(places.lines, dtype=torch.int32, device=mine.device)
    sending = dict(zip(SENDING, (ranks_at, epochs, rank, places.lines, places.slot), strict=True))
    return {"mine_ptr": mine, **sending}, {**sending, "SEND": True}


def places_for(graph: Graph) -> Places:
    """Room for all sums over ranks in a graph."""
    widths = [type_of(node).shape[-1] for node in graph.calls() if op_name(node.target) in TILE_MEETINGS]
    rows = [padded_width(width) for width in widths if isinstance(width, int) and width <= WIDEST_ROW]
    return Places(ranks_of(graph), max([TILE, *rows]))


def meeting_of(graph: Graph) -> Node | None:
    """The sum over ranks in a kernel's region, of which there is one at most."""
    return next((node for node in graph.calls() if op_name(node.target) in TILE_MEETINGS), None)


def sent_by(graph: Graph) -> Node | None:
    """What a kernel sends to other ranks, if it does."""
    return next((node for node in graph.calls() if op_name(node.target) == "dist.send"), None)


def ranks_of(graph: Graph) -> int:
    """For how many ranks a kernel's region is."""
    node = meeting_of(graph) or sent_by(graph)
    return int(str(node.args[1])) if node is not None else 1
