"""Weights that a checkpoint holds rounded: how a captured graph states them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch.fx import Node

from .build import insert_before
from .checkpoints.held import order_name
from .graph import Graph, type_of
from .ops import aten, resolve
from .types import TensorType


def state_rounded(graph: Graph, schemes: Mapping[str, str], ordered: Collection[str] = ()) -> None:
    """Give weights the types of their schemes, by name; what was traced reads the numbers that they stand for.

    The columns of ``ordered`` ones are first put where they belong: ``aten.index_add`` on zeros.
    """
    for node in list(graph.calls()):
        name = str(node.args[0]) if str(node.target) == "weight" else ""
        if name not in schemes:
            continue
        plain, readers = type_of(node), list(node.users)
        node.meta["type"] = plain.with_dtype(schemes[name])
        place = node.next

        def add(target: Any, args: tuple[Any, ...], end: str, place: Node = place, stem: str = node.name) -> Node:
            return insert_before(graph, place, target, args, name=f"{stem}_{end}")

        numbers = add(aten("to.dtype"), (node, plain.torch_dtype), "numbers")
        if name in ordered:
            with graph.inserting_before(place):
                order = graph.create_node(
                    "call_function", resolve("weight"), (order_name(name),), name=f"{node.name}_order"
                )
            order.meta["type"] = TensorType("i64", plain.shape[-1:])
            zeros = add(aten("zeros_like"), (numbers,), "zeros")
            numbers = add(aten("index_add"), (zeros, 1, order, numbers), "in_place")
        for user in readers:
            user.replace_input_with(node, numbers)


def alike(schemes: Mapping[str, str], ordered: Collection[str], names: Iterable[str]) -> bool:
    """Whether weights of that name in other layers are held in the same way."""
    found: dict[str, set[tuple[str | None, bool]]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "#", name), set()).add((schemes.get(name), name in ordered))
    return all(len(kinds) == 1 for kinds in found.values())
