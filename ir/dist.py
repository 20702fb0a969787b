"""Operators of a group of ranks: cutting a value to a rank's part, and making parts whole again.

With ``ranks=1`` each is the identity: so they stand in a graph that states whole shapes and says after ``@`` which part of
them a rank holds. In the graph of one rank they have the number of ranks as their last argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from .graph import Graph, type_of
from .infer import TypeInferenceError
from .ops import Op, is_collective, register
from .quantized import pack, unpack
from .schemes import scheme_of
from .types import TensorType


class Group(Protocol):
    """The ranks that run a graph together, as seen by one of them.

    Every rank calls the same collectives in the same order, and all get the same bits.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, of the same shape and type, added up in the order of the ranks."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The ranks' tensors, which have one shape and type, in the order of the ranks."""


@dataclass(frozen=True)
class Alone:
    """A group of one."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]


@dataclass(frozen=True)
class Mirror:
    """The first of ``size`` ranks that all have what it has: runs by itself what is made for several."""

    size: int
    rank: int = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return x * self.size

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x] * self.size


ALONE = Alone()
MEETINGS = frozenset({"dist.all_reduce", "dist.receive", "dist.all_gather"})
"""The operators in which ranks wait for each other; the others compute with what a rank has."""


def _type_of_part(x: Node, dim: int, sections: Sequence[int], ranks: int = 1) -> TensorType:
    kind = type_of(x)
    if 0 <= dim < kind.rank and is_padded(kind.shape[dim], sections):
        kind = _resized(kind, dim, sections[0])
    return _resized(kind, dim, _part_of(kind, dim, sections, ranks))


@register("dist.shard", infer_type=_type_of_part)
def shard(x: Tensor, dim: int, sections: Sequence[int], ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """This rank's part of a value that all have whole: of each section of ``dim`` in turn, part ``rank`` of ``ranks``.

    What is made of several parts next to each other (queries, keys and values) has a section for each. A single section may
    be longer than the dim, which is padded then: its last element is stated so often. Rows of quantised matrices are cut
    like those of any.
    """
    _check(group, ranks)
    if ranks == 1 and not is_padded(x.shape[dim], sections):
        return x
    pieces = _pieces(x, dim, sections, ranks, group.rank if ranks > 1 else 0)
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


def _type_of_columns(rows: Node, scheme: str, sections: Sequence[int], ranks: int = 1) -> TensorType:
    kind, found = type_of(rows), scheme_of(scheme)
    if found is None or kind.dtype != scheme:
        raise TypeInferenceError(f"{kind} does not hold codes of {scheme}")
    size = _part_of(kind, kind.rank - 1, sections, ranks)
    for section in sections:
        if found.reason_against(section // ranks):
            raise TypeInferenceError(found.reason_against(section // ranks))
    return _resized(kind, kind.rank - 1, size)


@register("dist.shard_columns", infer_type=_type_of_columns)
def shard_columns(
    rows: Tensor, scheme: str, sections: Sequence[int], ranks: int = 1, *, group: Group = ALONE
) -> Tensor:
    """``dist.shard`` of the last dim of a quantised matrix, whose rows keep the factors that they have.

    Groups of columns that share a factor are cut whole; a factor of a whole row is that of each of its parts.
    """
    _check(group, ranks)
    found = scheme_of(scheme)
    if ranks == 1 or found is None:
        return rows
    codes, factors, zeros = unpack(rows, found, sum(sections))

    def part(value: Tensor, share: int) -> Tensor:
        sizes = [section // share for section in sections]
        return torch.cat(_pieces(value, value.dim() - 1, sizes, ranks, group.rank), -1)

    if found.group:
        factors = part(factors, found.group)
        zeros = None if zeros is None else part(zeros, found.group)
    own = part(codes.view(torch.uint8) if found.floats else codes, 1)
    return pack(own.view(torch.float8_e4m3fn) if found.floats else own, factors, zeros, found)


def _same_type(x: Node, ranks: int = 1) -> TensorType:
    kind = type_of(x)
    return TensorType(kind.dtype, kind.shape)


def _type_of_routed(ids: Node, experts: int, ranks: int = 1) -> TensorType:
    return _same_type(ids)


@register("dist.route", infer_type=_type_of_routed)
def route(ids: Tensor, experts: int, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """The experts that each token goes to, counted among those that this rank has: of ``experts``, padded so that the ranks
    can divide them, an equal share in the order of the ranks. One that another rank has is below 0 or past them.

    In the same way tokens go to the rows of a table of which each rank has some."""
    _check(group, ranks)
    return ids - group.rank * (padded(experts, ranks) // ranks) if ranks > 1 else ids


@register("dist.on_first", infer_type=_same_type)
def on_first(x: Tensor, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """``x`` on the first rank and zeros on the others: what is added to a sum of parts must be added once."""
    _check(group, ranks)
    return x if group.rank == 0 else torch.zeros_like(x)


@register("dist.all_reduce", infer_type=_same_type)
def all_reduce(x: Tensor, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """The sum of what the ranks have."""
    _check(group, ranks)
    return group.all_reduce(x) if ranks > 1 else x


@register("dist.send", infer_type=_same_type)
def send(x: Tensor, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """``x`` on its way to all ranks, for a ``dist.receive``: what makes it need not leave it behind here first."""
    _check(group, ranks)
    return x


@register("dist.receive", infer_type=_same_type)
def receive(sent: Tensor, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """The sum of what the ranks have sent: ``dist.all_reduce`` of it."""
    _check(group, ranks)
    return group.all_reduce(sent) if ranks > 1 else sent


def _type_of_whole(x: Node, dim: int, ranks: int = 1) -> TensorType:
    kind = type_of(x)
    size = kind.shape[dim]
    if not isinstance(size, int):
        raise TypeInferenceError(f"dim {dim} of {kind} has no fixed size")
    if scheme_of(kind.dtype) is not None and dim == kind.rank - 1:
        raise TypeInferenceError(f"parts of rows in {kind.dtype} have factors of their own: they are no whole rows")
    return _resized(kind, dim, size * ranks)


@register("dist.all_gather", infer_type=_type_of_whole)
def all_gather(x: Tensor, dim: int, ranks: int = 1, *, group: Group = ALONE) -> Tensor:
    """The parts that the ranks have, next to each other along ``dim``."""
    _check(group, ranks)
    return torch.cat(group.all_gather(x), dim) if ranks > 1 else x


def ranks_of(graph: Graph) -> int:
    """For how many ranks a graph is that of one; 1 if it states whole shapes."""
    for node in graph.calls():
        if isinstance(node.target, Op) and is_collective(node.target):
            place = [item.name for item in node.target.parameters].index("ranks")
            if len(node.args) > place:
                return int(str(node.args[place]))
    return 1


def padded(size: int, ranks: int) -> int:
    """The least number from ``size`` on that ranks can divide."""
    return -(-size // ranks) * ranks


def is_padded(size: object, sections: Sequence[int]) -> bool:
    """Whether the sections that a dim is cut in go on past its end."""
    return len(sections) == 1 and isinstance(size, int) and 0 < size < sections[0]


def spans(sections: Sequence[int], ranks: int, rank: int) -> list[tuple[int, int]]:
    """Where a rank's part of each section begins, and its size."""
    starts = [sum(sections[:place]) for place in range(len(sections))]
    return [(start + rank * (size // ranks), size // ranks) for start, size in zip(starts, sections, strict=True)]


def along(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """What a dim has from ``start`` on; past its end, its last element again."""
    if start + size <= x.shape[dim]:
        return x.narrow(dim, start, size)
    places = torch.arange(start, start + size, device=x.device).clamp(max=x.shape[dim] - 1)
    return x.index_select(dim, places)


def _pieces(x: Tensor, dim: int, sections: Sequence[int], ranks: int, rank: int) -> list[Tensor]:
    return [along(x, dim, start, size) for start, size in spans(sections, ranks, rank)]


def _part_of(kind: TensorType, dim: int, sections: Sequence[int], ranks: int) -> int:
    """The size of a rank's part of a dim that is made of these sections."""
    if not 0 <= dim < kind.rank or kind.shape[dim] != sum(sections) or ranks < 1:
        raise TypeInferenceError(f"dim {dim} of {kind} is not made of the sections {list(sections)}")
    if any(size % ranks for size in sections):
        raise TypeInferenceError(f"the sections {list(sections)} cannot be divided among {ranks} ranks")
    return sum(sections) // ranks


def _resized(kind: TensorType, dim: int, size: int) -> TensorType:
    return TensorType(kind.dtype, (*kind.shape[:dim], size, *kind.shape[dim + 1 :]))


def _check(group: Group, ranks: int) -> None:
    """A graph for several ranks runs in a group of as many; one that states whole shapes in any."""
    if ranks not in (1, group.size):
        raise LookupError(f"the graph is that of one of {ranks} ranks, and the group has {group.size}")
