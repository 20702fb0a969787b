"""The placements of projections, experts, attention and norms, and of the operators that cut and collect."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .dist import padded
from .ops import op_name
from .placement import PARTIAL, Known, Needs, Placement, Routed, Shard, cut_of, divided, rule, shape_of, whole
from .schemes import scheme_of


@rule("dist.shard", "dist.shard_columns")
def _shard(node: Node, known: Known, ranks: int) -> Placement:
    x = node.args[0]
    assert isinstance(x, Node)
    whole(known, f"{node.name} cuts it", x)
    columns = op_name(node.target) == "dist.shard_columns"
    dim: Any = len(shape_of(x)) - 1 if columns else node.args[1]
    sections: Any = node.args[2]
    return divided(dim, sections, ranks, x)


@rule("dist.route")
def _route(node: Node, known: Known, ranks: int) -> Placement:
    ids, experts = node.args[:2]
    assert isinstance(ids, Node) and isinstance(experts, int)
    whole(known, f"{node.name} sends rows where it says", ids)
    return Routed(ids, experts)


@rule("dist.on_first")
def _on_first(node: Node, known: Known, ranks: int) -> Placement:
    whole(known, f"{node.name} takes it on one rank", node.args[0])
    return PARTIAL


@rule("dist.all_reduce", linear=True)
def _all_reduce(node: Node, known: Known, ranks: int) -> Placement:
    x = node.args[0]
    assert isinstance(x, Node)
    if known(x) != PARTIAL:
        raise Needs(x, PARTIAL, f"{node.name} sums up parts")
    return None


@rule("dist.all_gather")
def _all_gather(node: Node, known: Known, ranks: int) -> Placement:
    x, dim = node.args[:2]
    assert isinstance(x, Node) and isinstance(dim, int)
    wanted = Shard(dim, (shape_of(x)[dim],))
    if known(x) != wanted:
        raise Needs(x, wanted, f"{node.name} puts parts next to each other")
    return None


@rule("aten.linear", "nn.scaled_linear", linear=True)
def _linear(node: Node, known: Known, ranks: int) -> Placement:
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, Node) and isinstance(weight, Node)
    return _product(node, x, weight, bias, 0, 1, known, ranks)


@rule("nn.grouped_linear", linear=True, routed=True)
def _grouped_linear(node: Node, known: Known, ranks: int) -> Placement:
    arguments: list[Any] = [*node.args, *(None, False)[len(node.args) - 3 :]]
    x, ids, weight, bias, turned, *_ = arguments
    cut = cut_of(weight, known)
    if isinstance(known(x), Routed) or (cut is not None and cut.dim == 0):
        return _by_expert(node, x, ids, weight, bias, known, ranks)
    whole(known, f"{node.name} sends rows where it says", ids)
    return _product(node, x, weight, bias, *((2, 1) if turned else (1, 2)), known, ranks)


@rule("nn.lookup", routed=True)
def _lookup(node: Node, known: Known, ranks: int) -> Placement:
    """A rank has some rows of the table, and gives zeros for the others."""
    table, ids = node.args
    assert isinstance(table, Node) and isinstance(ids, Node)
    count = shape_of(table)[0]
    share = Shard(0, (padded(count, ranks),))
    if known(table) != share:
        raise Needs(table, share, f"{node.name} has some of the rows")
    routed = known(ids)
    if not isinstance(routed, Routed) or padded(routed.experts, ranks) != padded(count, ranks):
        raise Needs(ids, Routed(ids, count), f"{node.name} has some of the rows")
    return PARTIAL


def _by_expert(node: Node, x: Node, ids: Node, weight: Node, bias: Any, known: Known, ranks: int) -> Placement:
    """A rank has some of the experts, and computes the rows that go to these; the others are zeros.

    Experts that the ranks cannot divide are padded. Of rows that are not whole themselves, the result is taken as a sum of
    these parts.
    """
    count = shape_of(weight)[0]
    share = Shard(0, (padded(count, ranks),))
    for item in (weight, bias):
        if isinstance(item, Node) and known(item) != share:
            raise Needs(item, share, f"{node.name} has some of the experts")
    routed, given = known(ids), known(x)
    if not isinstance(routed, Routed) or padded(routed.experts, ranks) != padded(count, ranks):
        raise Needs(ids, Routed(ids, count), f"{node.name} has some of the experts")
    if given not in (None, routed):
        raise Needs(x, None, f"{node.name} sends each row to an expert")
    return routed if given is None else PARTIAL


def _product(
    node: Node, x: Node, weight: Node, bias: Any, out_dim: int, in_dim: int, known: Known, ranks: int
) -> Placement:
    """Column parallel: a rank has some of the outputs. Row parallel: it has some of the inputs, and a part of the sum."""
    if known(x) == PARTIAL:
        raise Needs(x, None, f"{node.name} ({op_name(node.target)}) is computed from the sum")
    last, given, cut = len(shape_of(x)) - 1, cut_of(x, known), cut_of(weight, known)
    if given is not None and given.dim == last:
        _check_groups(node, x, weight, given, ranks)
        wanted = Shard(in_dim, given.sections)
        if cut != wanted:
            raise Needs(weight, wanted, f"{node.name} reads parts of rows")
        if isinstance(bias, Node) and known(bias) != PARTIAL:
            raise Needs(bias, PARTIAL, f"{node.name} is a sum of parts, to which it is added once")
        return PARTIAL
    if cut is None:
        whole(known, f"{node.name} adds it to whole rows", bias)
        return given
    if given is not None or cut.dim != out_dim:
        raise Needs(weight, None, f"{node.name} reads whole rows")
    if isinstance(bias, Node):
        wanted = Shard(len(shape_of(bias)) - 1, cut.sections)
        if known(bias) != wanted:
            raise Needs(bias, wanted, f"{node.name} has a part of the columns")
    return Shard(len(shape_of(node)) - 1, cut.sections)


def _check_groups(node: Node, x: Node, weight: Node, given: Shard, ranks: int) -> None:
    """Inputs that share a factor of a quantised weight stay together."""
    kind = weight.meta["type"]
    scheme = scheme_of(kind.dtype)
    if scheme is None:
        return
    for size in given.sections:
        if scheme.reason_against(size // ranks):
            raise Needs(x, None, f"{node.name}: {size // ranks} of {size} inputs are no whole groups of {kind.dtype}")


@rule("nn.quantize")
def _quantize(node: Node, known: Known, ranks: int) -> Placement:
    """Parts of rows that have one factor are rounded by the largest magnitudes that all ranks have."""
    arguments: list[Any] = [*node.args, *(1, None, None)[len(node.args) - 2 :]]
    x, name, _, divisors, absmax = arguments
    found, scheme = cut_of(x, known), scheme_of(name)
    whole(known, f"{node.name} looks for the largest of each row in it", absmax)
    if absmax is not None and found is not None and found.dim == len(shape_of(x)) - 1:
        _check_divisors(node, divisors, found, known)
        return found
    whole(known, f"{node.name} divides whole rows by it", divisors)
    if found is None or scheme is None:
        return None
    if found.dim == len(shape_of(x)) - 1 and (
        not scheme.group or any(scheme.reason_against(size // ranks) for size in found.sections)
    ):
        raise Needs(x, None, f"{node.name} rounds whole rows or groups")
    return found


@rule("nn.absmax")
def _absmax(node: Node, known: Known, ranks: int) -> Placement:
    """A rank has those of its part of the rows, if there is one part for each."""
    arguments: list[Any] = [*node.args, *(1, None)[len(node.args) - 1 :]]
    x, parts, divisors = arguments
    found, last = cut_of(x, known), len(shape_of(x)) - 1
    if found is None or found.dim != last:
        whole(known, f"{node.name} divides whole rows by it", divisors)
        return found
    if parts != ranks or len(found.sections) > 1:
        raise Needs(x, None, f"{node.name} reads other parts of rows than ranks have")
    _check_divisors(node, divisors, found, known)
    return Shard(last, (parts,))


def _check_divisors(node: Node, divisors: Node | None, cut: Shard, known: Known) -> None:
    wanted = Shard(0, cut.sections)
    if divisors is not None and known(divisors) != wanted:
        raise Needs(divisors, wanted, f"{node.name} divides parts of rows by it")


@rule("nn.attention")
def _attention(node: Node, known: Known, ranks: int) -> Placement:
    """Each rank has some of the heads, and the keys and values of these."""
    q, k, v, *_ = node.args
    sinks = node.args[8] if len(node.args) > 8 else node.kwargs.get("sinks")
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    cut = next((item for item in (q, k, v) if known(item) is not None), q)
    heads = [shape_of(item)[-2] for item in (q, k, v)]
    for item, count in zip((q, k, v), heads):
        found, place = cut_of(item, known), len(shape_of(item)) - 2
        if found is not None and found != Shard(place, (count,)):
            raise Needs(item, None, f"{node.name} reads whole heads")
        if found is None:
            if count % ranks:
                raise Needs(cut, None, f"{count} heads cannot be divided among {ranks} ranks")
            raise Needs(item, Shard(place, (count,)), f"{node.name} has some of the heads")
    if isinstance(sinks, Node) and known(sinks) != Shard(0, (heads[0],)):
        raise Needs(sinks, Shard(0, (heads[0],)), f"{node.name} has some of the heads")
    return Shard(len(shape_of(node)) - 2, (heads[0],))


@rule("nn.rope")
def _rope(node: Node, known: Known, ranks: int) -> Placement:
    x, *tables = node.args[:3]
    assert isinstance(x, Node)
    whole(known, f"{node.name} turns whole heads by it", *tables)
    return _along_rows(node, x, known)


@rule("nn.rms_norm", "nn.layer_norm")
def _norm(node: Node, known: Known, ranks: int) -> Placement:
    x, *scales = node.args
    assert isinstance(x, Node)
    whole(known, f"{node.name} scales whole rows by it", *scales)
    return _along_rows(node, x, known)


@rule("nn.add_rms_norm")
def _add_norm(node: Node, known: Known, ranks: int) -> Placement:
    whole(known, f"{node.name} (nn.add_rms_norm) reads whole rows", *node.args)
    return None


@rule("aten.softmax.int", "aten.log_softmax.int", "aten.topk", "aten.cumsum", "aten.sort")
def _along_dim(node: Node, known: Known, ranks: int) -> Placement:
    x = node.args[0]
    assert isinstance(x, Node)
    found, at = cut_of(x, known), 2 if op_name(node.target) == "aten.topk" else 1
    place = node.args[at] if len(node.args) > at else -1
    if found is None or not isinstance(place, int) or found.dim == place % len(shape_of(x)):
        raise Needs(x, None, f"{node.name} ({op_name(node.target)}) reads whole rows")
    return found


def _along_rows(node: Node, x: Node, known: Known) -> Placement:
    found = cut_of(x, known)
    if found is not None and found.dim == len(shape_of(x)) - 1:
        raise Needs(x, None, f"{node.name} ({op_name(node.target)}) reads whole rows")
    return found
