"""Add typed, named values to a graph."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from .graph import Graph
from .infer import infer
from .ops import op_name


def insert_before(
    graph: Graph,
    place: Node,
    target: Any,
    args: Any,
    kwargs: Any = None,
    name: str = "",
    source: str = "",
) -> Node:
    """A new value in front of ``place``, with its type inferred. Without a name it is called after its operator.

    Raises:
        TypeInferenceError: the operator does not take these arguments.
    """
    kwargs = dict(kwargs or {})
    if target is operator.getitem:
        kind = args[0].meta["type"][args[1]]
    else:
        kind = infer(target, tuple(args), kwargs)
    stem = op_name(target).removeprefix("aten.").removeprefix("nn.").partition(".")[0]
    with graph.inserting_before(place):
        node = graph.create_node("call_function", target, tuple(args), kwargs, name=name or stem)
    node.meta["type"] = kind
    if source:
        node.meta["source"] = source
    return node
