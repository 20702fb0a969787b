"""Products with a weight, the names of its parts, and how ranks may cut it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise

from torch.fx import Node

from ..ir.dist import padded
from ..ir.ops import PROJECTIONS, op_name
from ..ir.placement import Shard, shape_of


def is_projection(node: Node) -> bool:
    """Whether a value is a product of rows and a weight, or a weight for each of several experts."""
    return node.op == "call_function" and (op_name(node.target) in PROJECTIONS or is_grouped(node))


def is_grouped(node: Node) -> bool:
    """Whether a value is a product of rows and the weight of the expert that each goes to."""
    return node.op == "call_function" and op_name(node.target) == "nn.grouped_linear"


def rows_and_weight(node: Node) -> tuple[Node, Node]:
    """The rows and the weight of a projection."""
    x, weight = node.args[0], node.args[2 if is_grouped(node) else 1]
    assert isinstance(x, Node) and isinstance(weight, Node)
    return x, weight


def ways_to_cut(node: Node, ranks: int) -> list[Shard]:
    """How the weight of a projection may be cut: between its outputs; if it is for several experts, also between these,
    which are padded so that ranks can divide them."""
    if not is_grouped(node):
        return [Shard(0, _sections(node))]
    turned = len(node.args) > 4 and node.args[4]
    count = shape_of(rows_and_weight(node)[1])[0]
    return [Shard(2 if turned else 1, _sections(node)), Shard(0, (padded(count, ranks),))]


def is_by_expert(node: Node, way: Shard) -> bool:
    """Whether a cut of the weight of a projection is one between experts."""
    return is_grouped(node) and way.dim == 0


def _sections(node: Node) -> tuple[int, ...]:
    """The outputs of a projection that are read side by side, such as queries, keys and values: each is cut by itself.

    Those that are read alone because the others are not returned are put together first.
    """
    width = shape_of(node)[-1]
    assert isinstance(width, int)
    points = {0, width}
    readers = list(node.users)
    for user in readers:
        if is_returned(user):
            continue
        if op_name(user.target) == "aten.slice.Tensor" and user.args[1] == -1 and len(user.args) == 4:
            points.update(int(min(bound, width)) for bound in user.args[2:4])  # type: ignore[type-var, arg-type]
        elif user.op == "call_function" and len(user.all_input_nodes) == 1 and shape_of(user) == shape_of(node):
            readers += user.users
    ordered = sorted(points)
    return tuple(stop - start for start, stop in pairwise(ordered))


def is_returned(node: Node) -> bool:
    """Whether the graph returns a value, and nothing else reads it."""
    return all(user.op == "output" for user in node.users)


def fits(pattern: str, weights: set[str]) -> bool:
    """Whether a pattern fits the name of one of the weights, or of its module."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern) for name in weights)
