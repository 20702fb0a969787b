"""How kernels of several ranks meet: each writes what it has into memory of all, and waits for what the others wrote.

A program is a channel of its own: program ``p`` of a kernel meets program ``p`` of the same kernel on the other ranks. Every
32 bits travel in one word of 64 with the number of the meeting, so that a word says itself whether it has come (as in the
low-latency protocol of NCCL): nothing is ordered by fences. There are two places for each word, taken in turn. Who writes to
one for the second time has seen what all wrote to the other since, so all have read what it held.
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
from ..ir.tiles import WIDEST_ROW
from .coordinates import TILE, padded_width

POINTERS = {"mine_ptr": "*i64", "ranks_ptr": "*i64", "epochs_ptr": "*i32"}
NUMBERS = {"rank": "i32", "channels": "i32", "slot": "i32"}
"""The parameters that a kernel has for it, in the order of ``Exchange.arguments``, and their types."""

SUM_OF_RANKS = """@triton.jit
def packed(x, KIND: tl.constexpr):
    # Numbers as 32 bits each, or pairs of neighbours where they have 16.
    if KIND == tl.float32:
        return x.to(tl.int32, bitcast=True)
    low, high = tl.split(tl.reshape(x.to(KIND).to(tl.int16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def unpacked(bits, KIND: tl.constexpr):
    if KIND == tl.float32:
        return bits.to(tl.float32, bitcast=True)
    low, high = (bits & 0xFFFF).to(tl.int16), (bits >> 16).to(tl.int16)
    pairs = tl.join(low.to(KIND, bitcast=True), high.to(KIND, bitcast=True))
    return tl.reshape(pairs, (bits.shape[0], bits.shape[1] * 2)).to(tl.float32)


@triton.jit
def sum_of_ranks(x, mine_ptr, ranks_ptr, epochs_ptr, rank, channels, slot, RANKS: tl.constexpr, KIND: tl.constexpr):
    # The sum of the tiles that this program has on each rank, in the order of the ranks; every rank gets the same bits.
    channel = tl.program_id(0).to(tl.int64)
    epoch = tl.load(epochs_ptr + channel) + 1
    parity = (epoch & 1).to(tl.int64)
    bits = packed(x, KIND)
    word = (bits.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    place = tl.arange(0, bits.shape[0])[:, None] * bits.shape[1] + tl.arange(0, bits.shape[1])[None, :]
    for peer in tl.static_range(RANKS):
        if peer != rank:
            theirs = tl.multiple_of(tl.load(ranks_ptr + peer).to(tl.pointer_type(tl.int64)), 16)
            tl.store(theirs + ((parity * RANKS + rank) * channels + channel) * slot + place, word)
    total = tl.zeros(x.shape, tl.float32)
    for source in tl.static_range(RANKS):
        if source != rank:
            pointers = mine_ptr + ((parity * RANKS + source) * channels + channel) * slot + place
            found = tl.load(pointers, volatile=True)
            while tl.max(((found >> 32).to(tl.int32) != epoch).to(tl.int32)) > 0:
                found = tl.load(pointers, volatile=True)
            total += unpacked(found.to(tl.int32), KIND)
        else:
            total += unpacked(bits, KIND)
    tl.store(epochs_ptr + channel, epoch)
    return total
"""


class Exchange(Protocol):
    """What a launcher needs so that its kernel meets those of the other ranks."""

    arguments: tuple[Any, ...]
    """``POINTERS`` and ``NUMBERS``: the memory that the ranks write to, its addresses, and the meetings so far."""

    def takes(self, programs: int, tile: int, nbytes: int) -> bool:
        """Whether so many programs with tiles of so many elements, ``nbytes`` in all, may meet this way."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what is larger; may be written over ``x``."""


CHANNELS = 256
"""How many programs of a kernel may meet those of other ranks."""


@dataclass(frozen=True)
class Places:
    """The memory of one rank's exchange: ``channels`` programs may meet, with tiles of ``slot`` elements at most."""

    ranks: int
    slot: int
    channels: int = CHANNELS

    @property
    def words(self) -> int:
        """Numbers of 64 bits that others write to."""
        return 2 * self.ranks * self.channels * self.slot

    def hold(self, programs: int, tile: int) -> bool:
        return programs <= self.channels and tile <= self.slot


class MirrorExchange:
    """The exchange of a rank whose others have just what it has: what it would write to theirs it writes for them to its own.

    So a kernel runs by itself, on any device and in the interpreter, as it does among ranks.
    """

    def __init__(self, places: Places, device: torch.device | str) -> None:
        self._places, self._group = places, Mirror(places.ranks)
        mine = torch.zeros(places.words, dtype=torch.int64, device=device)
        step = places.channels * places.slot * mine.itemsize
        addresses = [mine.data_ptr() + peer * step for peer in range(places.ranks)]
        self.arguments = arguments_of(places, mine, addresses, 0)

    def takes(self, programs: int, tile: int, nbytes: int) -> bool:
        return self._places.hold(programs, tile)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)


def arguments_of(places: Places, mine: Tensor, addresses: Sequence[int], rank: int) -> tuple[Any, ...]:
    """``Exchange.arguments`` for the memory ``mine i64[places.words]``, all zeros, and the addresses of all ranks' memory."""
    ranks_at = torch.tensor(addresses, dtype=torch.int64, device=mine.device)
    epochs = torch.zeros(places.channels, dtype=torch.int32, device=mine.device)
    return mine, ranks_at, epochs, rank, places.channels, places.slot


def places_for(graph: Graph) -> Places:
    """Room for all sums over ranks in a graph."""
    widths = [type_of(node).shape[-1] for node in graph.calls() if op_name(node.target) == "dist.all_reduce"]
    rows = [padded_width(width) for width in widths if isinstance(width, int) and width <= WIDEST_ROW]
    return Places(ranks_of(graph), max([TILE, *rows]))


def meeting_of(graph: Graph) -> Node | None:
    """The sum over ranks in a kernel's region, of which there is one at most."""
    return next((node for node in graph.calls() if op_name(node.target) == "dist.all_reduce"), None)


def ranks_of(graph: Graph) -> int:
    """For how many ranks a kernel's region is."""
    node = meeting_of(graph)
    return int(str(node.args[1])) if node is not None else 1
