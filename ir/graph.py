"""The graph: a ``torch.fx.Graph`` whose nodes carry types, provenance and kernel regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .ops import is_pure
from .types import Dim, TensorType, Type

# The setters alone: an assignment also looks the node up among those of its target, which stays as it is.
_set_args: Callable[[Node, Any], None] = Node.args.fset  # type: ignore[attr-defined]
_set_kwargs: Callable[[Node, Any], None] = Node.kwargs.fset  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Region:
    """A kernel region: the nodes that carry the same region become one kernel. ``index`` tells equal names apart."""

    name: str
    index: int


class Graph(torch.fx.Graph):
    """A ``torch.fx.Graph`` with a name and named dynamic dims.

    ``dims`` maps each dim to its inclusive range. Every node has ``node.meta["type"]`` (``TensorType``, or a tuple of
    them for operators with several results); ``meta["source"]`` is its provenance, ``meta["region"]`` its kernel.
    ``options`` are the choices of the caller that passes need to know.
    ``str(graph)`` is the text form.
    """

    def __init__(
        self,
        name: str = "decoder",
        dims: dict[str, tuple[int, int]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dims: dict[str, tuple[int, int]] = dict(dims or {})
        self.options: dict[str, Any] = dict(options or {})

    def create_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        type_expr: Any = None,
    ) -> Node:
        """As in ``torch.fx``, which looks through the arguments it is given for symbolic sizes. There are none here, and
        it takes longer than all the rest."""
        node = super().create_node(op, target, None, None, name, type_expr)
        if args:
            _set_args(node, args)
        if kwargs:
            _set_kwargs(node, kwargs)
        return node

    def __str__(self) -> str:
        from .dump import dump

        return dump(self)

    def copy(self) -> Graph:
        """A graph with the same nodes, names and metadata that shares none of the nodes."""
        twin = Graph(self.name, self.dims, self.options)
        mapping: dict[Node, Node] = {}
        for node in self.nodes:
            made = twin.node_copy(node, lambda old: mapping[old])
            if made.name != node.name:
                made.name = node.name
            made.meta = dict(node.meta)
            mapping[node] = made
        return twin

    def add_input(self, name: str, type: TensorType) -> Node:
        """Append an input after the existing ones."""
        inputs = self.inputs()
        anchor = inputs[-1] if inputs else self._root
        with self.inserting_after(anchor):
            node = self.placeholder(name)
        node.meta["type"] = type
        return node

    def inputs(self) -> list[Node]:
        return [node for node in self.nodes if node.op == "placeholder"]

    def input(self, name: str) -> Node:
        """The input of that name. Raises ``KeyError`` if there is none."""
        for node in self.inputs():
            if node.name == name:
                return node
        raise KeyError(name)

    def output_node(self) -> Node:
        found: Node = next(node for node in reversed(self.nodes) if node.op == "output")
        return found

    def calls(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.op == "call_function")

    def eliminate_dead(self) -> int:
        """Remove values that nobody uses; writes in place stay. Returns how many were removed."""
        removed = 0
        for node in reversed(list(self.calls())):
            if not node.users and is_pure(node.target):
                self.erase_node(node)
                removed += 1
        return removed


def type_of(node: Node) -> TensorType:
    """The type of a value with one result."""
    value = node.meta["type"]
    if not isinstance(value, TensorType):
        raise TypeError(f"{node.name} has several results")
    return value


def flat_types(value: Type) -> tuple[TensorType, ...]:
    return value if isinstance(value, tuple) else (value,)


def dims_of(types: Iterable[Type]) -> set[str]:
    """The named dims that occur in the types."""
    return {
        name
        for value in types
        for single in flat_types(value)
        for size in single.shape
        if isinstance(size, Dim)
        for name, _ in size.terms
    }


def node_inputs(value: Any) -> Iterator[Node]:
    """The nodes inside an argument, in order, repeats included."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from node_inputs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from node_inputs(item)


def is_constant(node: Node) -> bool:
    """Whether a value depends on weights and numbers alone, so that it can be computed once at load time."""
    known = node.meta.get("constant")
    if known is None:
        if node.op != "call_function":
            known = False
        elif str(node.target) in ("weight", "const", "cache"):
            known = str(node.target) != "cache"
        else:
            sized = dims_of([node.meta["type"]]) if "type" in node.meta else ()  # rows for every token of a step
            known = is_pure(node.target) and not sized and not _counts(node.args)
            known = known and all(map(is_constant, node.all_input_nodes))
        node.meta["constant"] = known
    return bool(known)


def _counts(value: Any) -> bool:
    """Whether a dim occurs in an argument: what is computed is another number for each step."""
    return isinstance(value, Dim) or (isinstance(value, (list, tuple)) and any(map(_counts, value)))
