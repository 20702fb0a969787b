"""Refuse what would be silently wrong over concatenated sequences: any operator but attention that mixes tokens."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .dump import line_of
from .errors import UnsupportedModelError
from .graph import Graph, flat_types, node_inputs
from .ops import POINTWISE, op_name
from .types import Dim

_ALONG_DIM = frozenset(
    "sum mean amax amin max min argmax argmin prod cumsum cumprod logcumsumexp softmax _softmax log_softmax logsumexp topk sort "
    "argsort cat stack flip roll gather scatter scatter_add index_select index_add index_copy slice select diff norm "
    "linalg_vector_norm std var var_mean narrow unfold glu kthvalue median mode any all count_nonzero".split()
)
_ROWS_APART = frozenset("linear embedding reshape unsqueeze squeeze transpose permute expand layer_norm rms_norm".split())
_MADE_FROM_NOTHING = frozenset("arange zeros ones full empty rand randn eye linspace tril_indices triu_indices".split())
_NEVER = ("conv", "scan", "fft", "cdist", "scaled_dot_product", "lstm", "gru", "rnn", "unique", "nonzero", "bincount")


def refuse_mixing(graph: Graph) -> None:
    """Raise for the first operator, attention apart, that can carry information from one token to another.

    Raises:
        UnsupportedModelError: names the node and shows its line.
    """
    for node in graph.calls():
        why = _mixes(node)
        if why:
            raise UnsupportedModelError(f"{node.name}: {why}; only attention may look at other tokens\n    {line_of(node)}")


def _has_tokens(size: Any) -> bool:
    return isinstance(size, Dim)


def _token_axes(node: Node) -> list[int]:
    """The axes, counted from the right, whose size depends on the number of tokens."""
    shape = flat_types(node.meta["type"])[0].shape
    return [axis - len(shape) for axis, size in enumerate(shape) if _has_tokens(size)]


def _mixes(node: Node) -> str:
    name = op_name(node.target)
    packet = name.removeprefix("aten.").partition(".")[0]
    if name in POINTWISE or not name.startswith("aten."):
        return ""
    inputs = list(node_inputs([node.args, node.kwargs]))
    if packet in _MADE_FROM_NOTHING and _token_axes(node):
        return "" if packet in ("zeros", "ones", "full") else "it counts along the row of tokens instead of using position_ids"
    if any(word in packet for word in _NEVER):
        return "it mixes tokens"
    with_tokens = [item for item in inputs if _token_axes(item)]
    if not with_tokens or packet == "reshape":
        return _reshape_mixes(node) if packet == "reshape" and with_tokens else ""
    if packet in _ALONG_DIM:
        return _along(node, with_tokens[0])
    if packet == "linear" and -1 in _token_axes(inputs[0]):
        return "it sums over tokens"
    if packet in ("matmul", "bmm", "mm"):
        left, right = inputs
        if -1 in _token_axes(left) or (-2 in _token_axes(right)):
            return "it sums over tokens"
        if _token_axes(left) and _token_axes(right):
            return "it multiplies tokens with tokens"
    if packet in ("layer_norm", "rms_norm") and -1 in _token_axes(inputs[0]):
        return "it normalizes over tokens"
    if packet in ("index", "index_put", "einsum", "take") and packet != "index":
        return "it may move values between tokens"
    return ""


def _along(node: Node, source: Node) -> str:
    rank = len(flat_types(source.meta["type"])[0].shape)
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = schema.index("dim") if "dim" in schema else schema.index("dims") if "dims" in schema else None
    dims: Any = None
    if place is not None:
        dims = node.args[place] if place < len(node.args) else node.target._schema.arguments[place].default_value  # type: ignore[union-attr]
    if dims is None or dims == []:
        return "it reduces over everything, tokens included"
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        axis = dim if dim < 0 else dim - rank
        if axis in _token_axes(source):
            size = flat_types(source.meta["type"])[0].shape[axis]
            return f"it works along the row of tokens (dim {axis}, size {size})"
    return ""


def _reshape_mixes(node: Node) -> str:
    """Tokens must stay the outermost part of the dim they are in, or rows of different tokens would be interleaved."""
    before = [size for size in flat_types(node_input(node).meta["type"])[0].shape if size != 1]
    after = [size for size in flat_types(node.meta["type"])[0].shape if size != 1]
    for left, right in zip(before, after):
        if _has_tokens(left) or _has_tokens(right):
            return "" if _has_tokens(left) and _has_tokens(right) else "it folds tokens into another dim"
        if left != right:
            return "it folds tokens into another dim"
    return ""


def node_input(node: Node) -> Node:
    return next(node_inputs(node.args))
