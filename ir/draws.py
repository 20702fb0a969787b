"""Random weights and inputs on which a mistake shows: activations near 1, some rows tiny, nothing near 0 or 1 throughout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .graph import Graph, type_of
from .ops import LOOKUPS, op_name
from .quantized import quantize
from .schemes import scheme_of
from .types import Dim, TensorType

# Magnitudes of successive rows: of the third, epsilons are most of the norm; the fourth saturates activations.
_MAGNITUDES = (1.0, 0.5, 1e-3, 4.0, 0.03)
# Far from 0, yet such that fp32 keeps the angles of rotary embeddings to about 1e-5.
_FAR = 300
_UNBOUNDED = 1 << 30

# Where operators take an index.
_INDEXED = dict.fromkeys(LOOKUPS | {"nn.grouped_linear"}, 1)
_INDEXED |= dict.fromkeys(["aten.index_select", "aten.gather", "aten.scatter.value"], 2)
_VIEWS = frozenset(
    "aten.reshape aten.unsqueeze aten.expand aten.transpose.int aten.to.dtype aten.select.int aten.slice.Tensor "
    "aten.squeeze.dim aten.gather aten.cat".split()
)


class DrawnWeights(Mapping[str, Tensor]):
    """The weights of a graph by name, each drawn when it is first asked for; equal seeds give equal weights.

    Matrices are about ``1 / sqrt(fan_in)``, vectors between 0.4 and 0.9 with either sign, and the rows of embedding
    tables differ in magnitude. ``known`` are weights drawn before, to be shared between graphs.
    """

    def __init__(self, graph: Graph, seed: int, known: dict[tuple[str, TensorType], Tensor] | None = None) -> None:
        self._nodes = {str(node.args[0]): node for node in graph.calls() if str(node.target) == "weight"}
        self._seed = seed
        self._known = {} if known is None else known

    def __getitem__(self, name: str) -> Tensor:
        node = self._nodes[name]
        key = name, type_of(node)
        if key not in self._known:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            self._known[key] = _drawn_weight(node, generator)
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


def _drawn_weight(node: Node, generator: torch.Generator) -> Tensor:
    kind = type_of(node)
    shape = kind.concrete({})
    if scheme := scheme_of(kind.dtype):
        return quantize(torch.randn(shape, generator=generator) / math.sqrt(shape[-1]), scheme)
    if not kind.torch_dtype.is_floating_point:
        first, end = (0, 2) if kind.dtype == "bool" else index_range(node)
        return torch.randint(first, min(first + 4, end), shape, generator=generator).to(kind.torch_dtype)
    if len(shape) < 2:
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return ((0.4 + 0.5 * torch.rand(shape, generator=generator)) * signs).to(kind.torch_dtype)
    value = torch.randn(shape, generator=generator)
    if any(op_name(user.target) in LOOKUPS and user.args[0] is node for user in node.users):
        value *= _magnitudes(shape[0]).unsqueeze(-1)
    else:
        value /= math.sqrt(shape[-1])
    return value.to(kind.torch_dtype)


def _magnitudes(count: int) -> Tensor:
    return torch.tensor(_MAGNITUDES).repeat(-(-count // len(_MAGNITUDES)))[:count]


def draw_input(node: Node, dims: Mapping[str, int], seed: int) -> Tensor:
    """A value for an input. Rows of floats differ in magnitude and have a mean; ``positions`` begin far from 0 for odd
    seeds; other integers are valid wherever the graph uses them as indices.

    ``seed`` tells one sequence from another.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {node.name}".encode()))
    kind = type_of(node)
    shape = kind.concrete(dims)
    if kind.torch_dtype.is_floating_point:
        return draw_floats(kind, shape, generator)
    first, end = (0, 2) if kind.dtype == "bool" else index_range(node)
    if node.name == "positions":
        first = max(first, min(_FAR, end - shape[-1])) if seed % 2 else first
        return (torch.arange(shape[-1]) + first).expand(shape).to(kind.torch_dtype).contiguous()
    return torch.randint(first, min(end, first + (1 << 20)), shape, generator=generator).to(kind.torch_dtype)


def draw_floats(kind: TensorType, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows that differ in magnitude and have a mean; without rows, a matrix of about ``1 / sqrt(fan_in)`` or a vector."""
    value = torch.randn(shape, generator=generator) + 0.25
    place = row_axis(kind)
    if place is not None:
        column = [1] * len(shape)
        column[place] = -1
        value *= _magnitudes(shape[place]).reshape(column)
    elif len(shape) > 1:
        value /= math.sqrt(shape[-1])
    return value.to(kind.torch_dtype)


def draw_distinct(kind: TensorType, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows of numbers of which no two are equal, in bf16 either: which are the largest is the same for whoever looks."""
    half = torch.tensor([4.0], dtype=torch.bfloat16).view(torch.int16) - torch.arange(shape[-1] // 2 + 1)
    sizes = half.to(torch.int16).view(torch.bfloat16).float()  # 4 and the numbers of bf16 below it
    numbers = torch.cat((sizes, -sizes))[: shape[-1]]
    return numbers[torch.rand(shape, generator=generator).argsort(-1)].to(kind.torch_dtype)


def row_axis(kind: TensorType) -> int | None:
    """The dim that counts tokens (``T``) or rows asked for (``R``), if the type has one by itself."""
    return next((place for place, size in enumerate(kind.shape) if str(size) in ("T", "R")), None)


def index_range(node: Node, dims: Mapping[str, int] | None = None) -> tuple[int, int]:
    """Where integers begin that are valid wherever the graph uses the value as an index, through views and small offsets,
    and where they end.

    Tables with a size that is none of ``dims`` set no end.
    """
    first, end = 0, _UNBOUNDED
    for user in node.users:
        name = op_name(user.target)
        table, place = user.args[0] if user.args else None, 0
        found = 0, _UNBOUNDED
        if name == "dist.route" and isinstance(user.args[1], int):
            found = 0, user.args[1]
        elif name in ("aten.add.Tensor", "aten.sub.Tensor") and isinstance(user.args[1], int):
            offset = user.args[1] if name == "aten.add.Tensor" else -user.args[1]
            low, high = index_range(user, dims)
            found = (max(0, low - offset), high - offset) if high < _UNBOUNDED else found
        elif name in _INDEXED and user.args[_INDEXED[name]] is node:
            if name == "nn.grouped_linear":
                table = user.args[2] if len(user.args) < 6 or user.args[5] is None else user.args[5]
            elif name in ("aten.gather", "aten.scatter.value"):
                place = int(str(user.args[1]))
            found = 0, _size(table, place, dims)
        elif name in _VIEWS and not type_of(user).torch_dtype.is_floating_point:
            found = index_range(user, dims)
        first, end = max(first, found[0]), min(end, found[1])
    return first, max(first + 1, end)


def _size(table: Any, place: int, dims: Mapping[str, int] | None) -> int:
    """How many rows a table has, or that number itself."""
    size = type_of(table).shape[place] if isinstance(table, Node) else table
    if isinstance(size, Dim) and dims is not None and all(name in dims for name, _ in size.terms):
        size = size.substitute(dims)
    return size if isinstance(size, int) else _UNBOUNDED
