"""Weights that a checkpoint holds rounded: how a captured graph states them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .build import insert_before
from .graph import Graph, type_of
from .infer import Inference
from .ops import aten


def state_rounded(graph: Graph, schemes: Mapping[str, str]) -> None:
    """Give weights the types of their schemes, by name; what was traced reads the numbers that they stand for."""
    infer = Inference()
    for node in list(graph.calls()):
        scheme = schemes.get(str(node.args[0])) if str(node.target) == "weight" else None
        if scheme is None:
            continue
        plain = type_of(node)
        node.meta["type"] = plain.with_dtype(scheme)
        name = f"{node.name}_numbers"
        numbers = insert_before(graph, node.next, infer, aten("to.dtype"), (node, plain.torch_dtype), name=name)
        for user in [user for user in node.users if user is not numbers]:
            user.replace_input_with(node, numbers)


def alike(schemes: Mapping[str, str], names: Iterable[str]) -> bool:
    """Whether weights of that name in other layers are held in the same way."""
    found: dict[str, set[str | None]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "#", name), set()).add(schemes.get(name))
    return all(len(kinds) == 1 for kinds in found.values())
