"""Which results of a kernel may be written over one of its inputs."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.ops import op_name
from .region import RegionView


def overwritable(view: RegionView) -> dict[Node, Node]:
    """Results and the input that each may be written over: it is added to a product, and read for nothing else.

    Every program reads the elements that it writes, and no others of that input, before it writes them. The matrix
    library adds in place without the copy that it makes otherwise.
    """
    inside = set(view.nodes)
    found: dict[Node, Node] = {}
    for node in view.outputs:
        if op_name(node.target) != "aten.add.Tensor" or node.kwargs:
            continue
        for source, product in (node.args[:2], node.args[1::-1]):
            if (
                isinstance(source, Node)
                and isinstance(product, Node)
                and source in view.inputs
                and source not in found.values()
                and product in inside
                and op_name(product.target) == "aten.linear"
                and type_of(source) == type_of(node) == type_of(product)
                and [user for user in source.users if user in inside] == [node]
            ):
                found[node] = source
    return found
