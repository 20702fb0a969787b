"""What random graphs are built with: the draws of a fragment, and a graph that grows call by call."""

from __future__ import annotations

import operator
import random
from typing import Any, TypeVar

from torch.fx import Node

from fuseline.ir import Dim, Graph, TensorType
from fuseline.ir.graph import type_of
from fuseline.ir.infer import infer
from fuseline.ir.ops import aten, resolve
from fuseline.ir.types import DTYPES, Size

T = Dim.named("T")
Option = TypeVar("Option")


class Choices:
    """The draws of one fragment. If they are ``plain``, each takes its first option, which is the simplest."""

    def __init__(self, seed: str, plain: bool = False) -> None:
        self._random = random.Random(seed)
        self._plain = plain

    def of(self, *options: Option) -> Option:
        return options[0] if self._plain else self._random.choice(options)

    def chance(self, percent: float) -> bool:
        return not self._plain and 100 * self._random.random() < percent


class Builder:
    """A graph under construction. ``lead`` is ``[1, T]`` where values are batched as in a capture, else ``[T]``."""

    def __init__(self, dtype: str, batched: bool, width: int, block: int) -> None:
        self.graph = Graph("f", {"T": (1, 64)}, {"kv_block": block})
        self.dtype = dtype
        self.width = width
        self.tokens = self._input("tokens")
        self.positions = self._input("positions")
        self.lead: list[Size] = [T]
        if batched:
            self.lead = [1, T]
            self.tokens = self("unsqueeze", self.tokens, -2)
            self.positions = self("unsqueeze", self.positions, -2)
        self.layers = 0
        self.stream: list[Node] = []  # values as wide as the residual stream, for later readers
        self.shared: dict[Any, Any] = {}  # what several fragments may use
        self.names: dict[TensorType, list[str]] = {}

    def _input(self, name: str) -> Node:
        node = self.graph.placeholder(name)
        node.meta["type"] = TensorType("i64", (T,))
        return node

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Node:
        """Append a call of an ATen operator, or of one of ours by its full name."""
        target = resolve(op) if op.startswith("nn.") else aten(op)
        stem = op.removeprefix("nn.").partition(".")[0]
        node = self.graph.create_node("call_function", target, args, kwargs, name=stem)
        node.meta["type"] = infer(target, args, kwargs)
        return node

    def weight(self, c: Choices, *shape: int, dtype: str = "") -> Node:
        """A weight: a new one, or now and then one that another layer reads too, under a value of its own."""
        kind = TensorType(dtype or self.dtype, shape)
        known = self.names.setdefault(kind, [])
        if known and c.chance(15):
            name = c.of(*known)
        else:
            name = f"w{sum(map(len, self.names.values()))}"
            known.append(name)
        node = self.graph.create_node("call_function", resolve("weight"), (name,), {}, name=name)
        node.meta["type"] = kind
        return node

    def item(self, value: Node, index: int) -> Node:
        node = self.graph.call_function(operator.getitem, (value, index))
        node.meta["type"] = value.meta["type"][index]
        return node

    def commuted(self, c: Choices, op: str, left: Any, right: Any) -> Node:
        return self(op, left, right) if c.of(True, False) else self(op, right, left)

    def cast(self, value: Node, dtype: str) -> Node:
        return self("to.dtype", value, DTYPES[dtype])

    def like(self, value: Node, other: Node) -> Node:
        """``value`` in the element type of ``other``."""
        return value if dtype_of(value) == dtype_of(other) else self.cast(value, dtype_of(other))


def dtype_of(value: Node) -> str:
    return type_of(value).dtype


def shape_of(value: Node) -> list[Size]:
    return list(type_of(value).shape)


def last(value: Node) -> int:
    size = type_of(value).shape[-1]
    assert isinstance(size, int)
    return size


def linear(b: Builder, c: Choices, x: Node, width: int, weight: Node | None = None) -> Node:
    """A projection as ``nn.Linear`` or as gpt2's ``Conv1D`` writes it."""
    bias = b.weight(c, width) if c.chance(30) else None
    if weight is None and c.chance(25):
        rows = b("reshape", x, [T, last(x)]) if len(shape_of(x)) != 2 else x
        weight = b.weight(c, last(x), width)
        bias = bias or b.weight(c, width)
        return b("reshape", b("addmm", bias, rows, weight), [*b.lead, width])
    weight = weight or b.weight(c, width, last(x))
    return b("linear", x, weight) if bias is None else b("linear", x, weight, bias)


def residual(b: Builder, c: Choices, h: Node, branch: Node) -> Node:
    """The sum, which later fragments may read as well."""
    if last(branch) != b.width:
        branch = linear(b, c, branch, b.width)
    return b.commuted(c, "add.Tensor", h, b.like(branch, h))
