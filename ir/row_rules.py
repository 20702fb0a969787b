"""For each operator: where the rows of its result are, given where they are in its operands.

Dims are counted from the right throughout; calls are spelled as ``spelling.normalize`` leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .graph import flat_types, node_inputs
from .ops import POINTWISE, op_name
from .types import Dim


@dataclass(frozen=True)
class Rows:
    """The axis that holds the tokens. ``outer`` says how often the whole row of tokens stands in it, one after another."""

    axis: int
    outer: int = 1


class Mixes(Exception):
    """The operator may carry information between tokens; says how."""


Known = Mapping[Node, Rows | None]
Rule = Callable[[Node, Known], Rows | None]

_RULES: dict[str, Rule] = {}
# Operators with a size among their arguments: the number of tokens may stand there.
_TAKES_SIZES = frozenset(["reshape", "expand", "repeat", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full"])
_POINTWISE_TOO = frozenset("gelu mish silu hardswish bucketize softsign polar complex real imag".split())


def rows_of_call(node: Node, known: Known) -> Rows | None:
    """Where the rows of a call's result are; nothing if it does not depend on the tokens.

    Raises:
        Mixes: it may mix tokens, draws random numbers, or depends on how many tokens there are.
    """
    packet = packet_of(node)
    if "rand" in packet or packet in ("bernoulli", "dropout", "multinomial", "normal", "exponential"):
        raise Mixes("it draws random numbers")
    if packet in ("empty", "new_empty", "empty_like", "empty_strided"):
        raise Mixes("it reads memory that was never written")
    if packet in ("arange", "linspace") and _has_dim(node.args):
        raise Mixes("it counts along the row of tokens instead of using position_ids")
    if packet not in _TAKES_SIZES and _has_dim([node.args, node.kwargs]):
        raise Mixes("its result depends on how many tokens there are")
    if packet in _FILLS:
        return _filled(node, known)
    with_rows = [item for item in node_inputs([node.args, node.kwargs]) if known[item] is not None]
    if not with_rows and packet not in ("expand", "repeat"):
        return None
    if op_name(node.target) in POINTWISE or packet in _POINTWISE_TOO or _is_pointwise(node.target):
        return _same(node, known)
    rule = _RULES.get(packet)
    if rule is None:
        raise Mixes(f"how {op_name(node.target)} treats tokens is not known")
    return rule(node, known)


def packet_of(node: Node) -> str:
    """The operator's name without namespace and overload."""
    return op_name(node.target).removeprefix("aten.").partition(".")[0] if _is_aten(node) else op_name(node.target)


def _is_aten(node: Node) -> bool:
    return op_name(node.target).startswith("aten.")


def _is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _has_dim(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_dim, value))
    if isinstance(value, dict):
        return any(map(_has_dim, value.values()))
    return isinstance(value, Dim)


def row_rule(*packets: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def shape_of(value: Any) -> tuple[Any, ...]:
    return flat_types(value.meta["type"])[0].shape


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if place < len(node.args):
                return node.args[place]
            return argument.default_value if argument.has_default_value() else default
    return default


def dims_along(node: Node, name: str = "dim") -> list[int]:
    found = argument(node, name)
    if found is None or found == []:
        raise Mixes("it reduces over everything, tokens included")
    rank = len(shape_of(next(node_inputs(node.args))))
    return [item if item < 0 else item - rank for item in (found if isinstance(found, (list, tuple)) else [found])]


def one(node: Node, known: Known) -> Rows:
    """The rows of all operands that have rows, which must agree."""
    found = {known[item] for item in node_inputs([node.args, node.kwargs])} - {None}
    if len(found) != 1:
        raise Mixes("it pairs tokens with tokens")
    return next(item for item in found if item is not None)


def along(rows: Rows, dims: Sequence[int]) -> None:
    if rows.axis in dims:
        raise Mixes(f"it works along the row of tokens (dim {rows.axis})")


@row_rule("getitem", "prelu_kernel", "copy")
def _same(node: Node, known: Known) -> Rows | None:
    return one(node, known)


_FILLS = frozenset(
    ["zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"]
)


def _filled(node: Node, known: Known) -> Rows | None:
    """Every row is the same; the value that fills them must be a number."""
    if _has_dim(argument(node, "fill_value")):
        raise Mixes("its result depends on how many tokens there are")
    axes = [axis for axis, size in enumerate(shape_of(node)) if isinstance(size, Dim)]
    return Rows(axes[0] - len(shape_of(node))) if axes else None


@row_rule(
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "logsumexp", "norm", "linalg_vector_norm"
)
@row_rule("std", "var", "var_mean", "std_mean", "any", "all", "median", "kthvalue", "mode")
def _reduce(node: Node, known: Known) -> Rows:
    rows, dims = one(node, known), dims_along(node)
    along(rows, dims)
    return rows if argument(node, "keepdim") else Rows(rows.axis + sum(dim > rows.axis for dim in dims), rows.outer)


@row_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
@row_rule(
    "topk",
    "sort",
    "argsort",
    "slice",
    "narrow",
    "diff",
    "glu",
    "cat",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "slice_scatter",
)
def _keeps_rank(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    along(rows, dims_along(node))
    return rows


@row_rule("flip", "roll")
def _named_dims(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    along(rows, dims_along(node, "dims"))
    return rows


@row_rule("linear", "prelu")
def _linear(node: Node, known: Known) -> Rows:
    _, *weights = node_inputs(node.args)
    if any(known[item] is not None for item in weights):
        raise Mixes("its weight is computed from the tokens")
    rows = one(node, known)
    if packet_of(node) == "prelu" and math.prod(shape_of(weights[0])) != 1:
        raise Mixes("its slopes belong to dim 1, where the tokens are")
    if rows.axis == -1:
        raise Mixes("it sums over tokens")
    return rows


@row_rule("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm")
def _matmul(node: Node, known: Known) -> Rows:
    *added, left, right = list(node_inputs(node.args))
    rows, other = known[left], known[right]
    if any(known[item] is not None for item in added) or "addbmm" in packet_of(node):
        raise Mixes("it adds values of tokens to a product")
    if len(shape_of(left)) < 2 or len(shape_of(right)) < 2:
        raise Mixes("it multiplies with a vector")
    if (rows is not None and rows.axis == -1) or (other is not None and other.axis == -2):
        raise Mixes("it sums over tokens")
    if rows is not None and other is not None and (rows != other or rows.axis >= -2):
        raise Mixes("it multiplies tokens with tokens")
    found = rows or other
    assert found is not None
    return found


@row_rule("layer_norm", "rms_norm")
def _norm(node: Node, known: Known) -> Rows:
    rows = one(node, known)
    if any(known[item] is not None for item in list(node_inputs(node.args))[1:]):
        raise Mixes("its weight is computed from the tokens")
    if rows.axis >= -len(node.args[1]):  # type: ignore[arg-type]
        raise Mixes("it normalizes over tokens")
    return rows
