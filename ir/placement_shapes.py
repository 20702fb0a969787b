"""The placements of operators that move values, join them, or sum them up along a dim."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from .graph import dims_of, type_of
from .ops import op_name
from .placement import PARTIAL, Known, Needs, Placement, Shard, cut_of, divided, rule, shape_of

# Stand-ins for named dims: sizes that no product of others makes.
_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067)


@rule("getitem", linear=True)
def _getitem(node: Node, known: Known, ranks: int) -> Placement:
    return known(_source(node))


@rule("aten.reshape", linear=True)
def _reshape(node: Node, known: Known, ranks: int) -> Placement:
    """A dim that is split gives its cut to the first of its parts, and one that is joined takes that of the first."""
    x = _source(node)
    if known(x) == PARTIAL:
        return PARTIAL
    found = cut_of(x, known)
    assert found is not None
    names = sorted(dims_of([type_of(x), type_of(node)]))
    sizes = dict(zip(names, _PRIMES))
    before, after = type_of(x).concrete(sizes), type_of(node).concrete(sizes)
    ahead, inner = prod(before[: found.dim]), prod(before[found.dim + 1 :])
    for place, size in enumerate(after):
        rest = prod(after[place + 1 :])
        if prod(after[:place]) == ahead and size > 1:
            counts = [section * inner for section in found.sections]
            if any(count % rest for count in counts) or sum(counts) != size * rest:
                break
            return divided(place, [count // rest for count in counts], ranks, x)
    raise Needs(x, None, f"{node.name} (aten.reshape) mixes its parts")


@rule("aten.slice.Tensor", linear=True)
def _slice(node: Node, known: Known, ranks: int) -> Placement:
    """Along the dim that is cut: whole sections, or each so-many-th value of all of it."""
    x, dim, start, end, step = _slice_arguments(node)
    found = cut_of(x, known)
    if found is None or found.dim != dim:
        return known(x)
    bounds = [sum(found.sections[:place]) for place in range(len(found.sections) + 1)]
    if step == 1 and start in bounds and end in bounds:
        return Shard(dim, found.sections[bounds.index(start) : bounds.index(end)])
    size = bounds[-1]
    if len(found.sections) == 1 and start < step and end == size and not size // ranks % step:
        return divided(dim, [size // step], ranks, x)
    raise Needs(x, None, f"{node.name} (aten.slice) takes a part of its parts")


def _slice_arguments(node: Node) -> tuple[Node, int, int, int, int]:
    """``(x, dim, start, end, step)``, counted from the left."""
    arguments: list[Any] = [*node.args, *[None] * 4][:5]
    x, dim, start, end, step = arguments
    place = (dim or 0) % len(shape_of(x))
    size = shape_of(x)[place]
    if not isinstance(size, int):
        return x, place, 0, 0, 1
    first, last, stride = slice(start, end, step).indices(size)
    return x, place, first, last, stride


def local_slice(node: Node, ranks: int) -> tuple[Any, ...]:
    """The arguments of a slice along a dim that is cut, for one rank's part."""
    x, dim, start, end, step = _slice_arguments(node)
    if step == 1:
        return (x, dim - len(shape_of(x)), start // ranks, end // ranks)
    return (x, dim - len(shape_of(x)), start, end // ranks, step)


@rule("aten.cat", "nn.cat_rows", linear=True)
def _cat(node: Node, known: Known, ranks: int) -> Placement:
    """Along the dim that is cut, the sections of the parts follow each other."""
    parts: Any = node.args[0]
    if all(known(item) == PARTIAL for item in parts):
        return PARTIAL
    for item in parts:
        if known(item) == PARTIAL:
            raise Needs(item, None, f"{node.name} (aten.cat) joins it with what is whole")
    rank = len(shape_of(node))
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    cuts = [cut_of(item, known) for item in parts]
    first = next(item for item in cuts if item is not None)
    joined = first.dim == dim % rank
    sections: list[int] = []
    for item, found in zip(parts, cuts):
        wanted = Shard(first.dim, (shape_of(item)[first.dim],) if joined else first.sections)
        if found is None:
            divided(first.dim, wanted.sections, ranks, next(part for part, cut in zip(parts, cuts) if cut == first))
            raise Needs(item, wanted, f"{node.name} (aten.cat) joins it with parts")
        if found.dim != first.dim or (not joined and found != first):
            raise Needs(item, None, f"{node.name} (aten.cat) joins parts that are cut otherwise")
        sections += found.sections
    return Shard(first.dim, tuple(sections) if joined else first.sections)


@rule("aten.stack", linear=True)
def _stack(node: Node, known: Known, ranks: int) -> Placement:
    """Parts that are cut alike are put next to each other in a new dim."""
    arguments: list[Any] = [*node.args, 0][:2]
    parts, dim = arguments
    first = next(item for item in parts if known(item) is not None)
    for item in parts:
        if known(item) != known(first):
            raise Needs(
                first, None, f"{node.name} (aten.stack) joins it with {item.name}, which is cut otherwise or whole"
            )
    found = known(first)
    if not isinstance(found, Shard):
        return found
    return Shard(found.dim + (dim % len(shape_of(node)) <= found.dim), found.sections)


@rule("aten.unsqueeze", linear=True)
def _unsqueeze(node: Node, known: Known, ranks: int) -> Placement:
    found = known(_source(node))
    if not isinstance(found, Shard):
        return found
    dim: Any = node.args[1]
    return Shard(found.dim + (dim % len(shape_of(node)) <= found.dim), found.sections)


@rule("aten.squeeze.dim", linear=True)
def _squeeze(node: Node, known: Known, ranks: int) -> Placement:
    x = _source(node)
    found = known(x)
    if not isinstance(found, Shard) or len(shape_of(x)) == len(shape_of(node)):
        return found
    dim: Any = node.args[1]
    return Shard(found.dim - (dim % len(shape_of(x)) < found.dim), found.sections)


@rule("aten.transpose.int", linear=True)
def _transpose(node: Node, known: Known, ranks: int) -> Placement:
    x = _source(node)
    swapped: Any = node.args[1:3]
    found = known(x)
    if not isinstance(found, Shard):
        return found
    one, other = (item % len(shape_of(x)) for item in swapped)
    return Shard({one: other, other: one}.get(found.dim, found.dim), found.sections)


@rule("aten.permute", linear=True)
def _permute(node: Node, known: Known, ranks: int) -> Placement:
    x, found = _source(node), known(_source(node))
    dims: Any = node.args[1]
    if not isinstance(found, Shard):
        return found
    order = [item % len(shape_of(x)) for item in dims]
    return Shard(order.index(found.dim), found.sections)


@rule("aten.expand", linear=True)
def _expand(node: Node, known: Known, ranks: int) -> Placement:
    found = known(_source(node))
    if not isinstance(found, Shard):
        return found
    return Shard(found.dim + len(shape_of(node)) - len(shape_of(_source(node))), found.sections)


@rule("aten.index_select", linear=True)
def _index_select(node: Node, known: Known, ranks: int) -> Placement:
    x, dim, index = node.args
    assert isinstance(x, Node) and isinstance(index, Node) and isinstance(dim, int)
    found = known(x)
    if known(index) is not None:
        raise Needs(index, None, f"{node.name} (aten.index_select) chooses by it")
    if isinstance(found, Shard) and found.dim == dim % len(shape_of(x)):
        raise Needs(x, None, f"{node.name} (aten.index_select) chooses from all of it")
    return found


@rule("aten.sum.dim_IntList", "aten.mean.dim", linear=True)
def _sum(node: Node, known: Known, ranks: int) -> Placement:
    arguments: list[Any] = [*node.args, *(None, False)[len(node.args) - 1 :]]
    x, dims, keep = arguments[:3]
    found = known(x)
    if not isinstance(found, Shard):
        return found
    places = [dim % len(shape_of(x)) for dim in dims or ()]
    if found.dim in places or not places:
        raise Needs(x, None, f"{node.name} ({op_name(node.target)}) sums up all of it")
    return Shard(found.dim if keep else found.dim - sum(place < found.dim for place in places), found.sections)


def _source(node: Node) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    return x
