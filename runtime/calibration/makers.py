"""Where what a projection reads gets its size from: a weight that can be divided, so that the projection's is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...ir.graph import is_constant, type_of
from ...ir.ops import PROJECTIONS, op_name
from ...ir.quantized import is_quantised, unpack
from ...ir.schemes import scheme_of

_GATED = frozenset({"nn.silu_mul", "nn.gelu_mul"})


@dataclass(frozen=True)
class Maker:
    """``weight``: the scale of a norm, or a rounded matrix. Of its entries, or rows, those from ``begin`` on make the
    inputs of a projection: ``channels i64 [K]`` says for each input which, counted from there."""

    weight: Node
    begin: int
    channels: Tensor

    def divided(self, value: Tensor, vector: Tensor) -> Tensor:
        """The weight with what makes the inputs divided by ``vector``: a scale's numbers, or the factors of rows."""
        made, end = value.clone(), self.begin + len(vector)
        if not is_quantised(self.weight):
            made[self.begin : end] = (value[self.begin : end].float() / vector).to(value.dtype)
            return made
        kind = type_of(self.weight)
        scheme, depth = scheme_of(kind.dtype), kind.shape[-1]
        assert scheme is not None and isinstance(depth, int)
        factors = unpack(value, scheme, depth)[1][self.begin : end] / vector[:, None]
        place = scheme.factors_at(depth)
        made[self.begin : end, place : place + 4 * factors.shape[1]] = factors.contiguous().view(torch.uint8)
        return made

    def exact(self, value: Tensor, vector: Tensor) -> Tensor:
        """What the weight will have been divided by: a scale is rounded to its type again."""
        if is_quantised(self.weight):
            return vector
        made = self.divided(value, vector).float()
        return torch.where(made != 0, value.float() / made, 1.0)


def maker_of(projection: Node) -> Maker | None:
    """The weight behind the inputs of a projection, if nothing else reads what it makes: the scale of a norm, the upper
    half of a gated MLP, or the values that attention takes means of."""
    depth, made = type_of(projection.args[0]).shape[-1], _alone(projection.args[0])  # type: ignore[arg-type]
    if made is None or not isinstance(depth, int):
        return None
    name, shape, channels = op_name(made.target), type_of(made).shape, torch.arange(depth)
    if name == "nn.rms_norm" or (name == "nn.layer_norm" and made.args[2] is None):
        scale = made.args[1]
        known = isinstance(scale, Node) and str(scale.target) == "weight" and len(scale.users) == 1
        return Maker(scale, 0, channels) if known and shape[-1] == depth else None  # type: ignore[arg-type]
    if name in _GATED and shape[-1] == depth:
        return _rows(made.args[1], channels)
    if name == "nn.paged_attention":
        written, (heads, size) = made.args[2], shape[-2:]
        assert isinstance(written, Node) and isinstance(heads, int) and isinstance(size, int)
        if op_name(written.target) == "nn.cache_write" and len(written.users) == 1 and heads * size == depth:
            shared = type_of(written).shape[-2]
            assert isinstance(shared, int)
            # Queries of several heads read the values of one.
            entries = torch.arange(shared * size).reshape(shared, 1, size)
            return _rows(written.args[1], entries.expand(-1, heads // shared, -1).flatten())
    return None


def _rows(value: Any, channels: Tensor) -> Maker | None:
    """The rows of a rounded matrix that make a value, alone and without a bias."""
    found = rows_of(value)
    if found is None:
        return None
    linear, begin, end = found
    if end - begin != int(channels.max()) + 1 or (len(linear.args) > 2 and linear.args[2] is not None):
        return None
    weight = linear.args[1]
    assert isinstance(weight, Node)
    known = op_name(weight.target) == "nn.quantize" and is_constant(weight) and len(weight.users) == 1
    return Maker(weight, begin, channels) if known else None


def rows_of(value: Any) -> tuple[Node, int, int] | None:
    """The projection that makes a value, and which rows of its matrix do, if one operator alone reads what they make."""
    linear = made = _alone(value)
    if made is None:
        return None
    begin, end = 0, type_of(made).shape[-1]
    if op_name(made.target) == "aten.slice.Tensor":
        linear, _, begin = made.args[:3]  # type: ignore[assignment]
        assert isinstance(linear, Node) and isinstance(end, int)
        end += begin  # a slice may be stated to end beyond the last column
        if begin < 0:
            return None
        for other in linear.users:
            part = other.args[2:4] if op_name(other.target) == "aten.slice.Tensor" else (0, end)
            if other is not made and part[0] < end and begin < part[1]:  # type: ignore[operator]
                return None
    known = isinstance(linear, Node) and op_name(linear.target) in PROJECTIONS and isinstance(end, int)
    return (linear, begin, end) if known else None  # type: ignore[return-value]


def _alone(value: Any) -> Node | None:
    """What computes a value that one operator alone reads, before changes of its shape."""
    while isinstance(value, Node) and len(value.users) == 1:
        if op_name(value.target) != "aten.reshape":
            return value
        value = value.args[0]
    return None
