"""Projections and experts on the CPU with weights laid out for it: packed for its vector units (oneDNN), or in codes
(``rounded``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.graph import type_of
from ..ir.loop import Loop
from ..ir.nn import by_expert
from ..ir.ops import PROJECTIONS, op_name
from ..ir.schemes import scheme_of
from ..ir.types import TensorType
from .rounded import Product, rounded_product

Linear = Callable[..., Tensor]
"""From rows (and for experts, which ones they go to) to the result of a projection."""
T = TypeVar("T")

# Below this many elements a plain call costs less than the way to the packed one.
_SMALLEST = 1 << 16


def pack_linears(loop: Loop, constants: dict[Node, list[Tensor]]) -> tuple[dict[Node, list[Linear]], int]:
    """Projections on the CPU by node, for each of its times (see ``at``), and the bytes of the weights laid out anew.

    Of experts, those with weights in codes: they become numbers expert by expert.

    Weights that nothing else reads are taken out of ``constants``, which are by node and time, too.
    """
    linears: dict[Node, list[Linear]] = {}
    products: dict[Node, list[list[Product]]] = {}
    size = 0
    for node in loop.graph.calls():
        grouped = op_name(node.target) == "nn.grouped_linear"
        if not grouped and op_name(node.target) not in PROJECTIONS:
            continue
        weight, bias, *_ = [*node.args[1 + grouped :], None]
        assert isinstance(weight, Node)
        if grouped and scheme_of(type_of(weight).dtype) is None:
            continue
        if isinstance(bias, Node) and bias not in constants:
            continue  # it is computed in the step
        if weight not in products:
            values, kind = constants.get(weight), type_of(weight)
            if values is None or not _is_packed(values[0], kind):
                continue
            products[weight] = [[_product(item, kind) for item in (value if grouped else [value])] for value in values]
            size += sum(value.nbytes for value in values)
        biases: Sequence[Tensor | None] = constants[bias] if isinstance(bias, Node) else [None]
        count = max(len(products[weight]), len(biases))
        dtype = type_of(node).torch_dtype
        laid = [(at(products[weight], time), at(biases, time)) for time in range(count)]
        width = type_of(node).shape[-1]
        assert isinstance(width, int)
        linears[node] = [
            _grouped(found, value, dtype, width) if grouped else _linear(found[0], value, dtype)
            for found, value in laid
        ]
    for weight in products:
        if all(user in linears and user.all_input_nodes.count(weight) == 1 for user in weight.users):
            del constants[weight]
    return linears, size


def at(values: Sequence[T], time: int) -> T:
    """The value of a time counted from 0; a single one is that of all times."""
    return values[time] if len(values) > 1 else values[0]


def _is_packed(weight: Tensor, kind: TensorType) -> bool:
    if weight.device.type != "cpu":
        return False
    if scheme_of(kind.dtype) is not None:
        return True
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST


def _product(weight: Tensor, kind: TensorType) -> Product:
    scheme, depth = scheme_of(kind.dtype), kind.shape[-1]
    if scheme is not None:
        assert isinstance(depth, int)
        return rounded_product(weight, scheme, depth)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def _linear(product: Product, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    return lambda x: product(x, bias, dtype)


def _grouped(products: Sequence[Product], biases: Tensor | None, dtype: torch.dtype, width: int) -> Linear:
    """The products of all experts as one."""

    def product(expert: int, rows: Tensor) -> Tensor:
        return products[expert](rows, None if biases is None else biases[expert], dtype)

    return lambda x, ids: by_expert(x, ids, len(products), width, dtype, product)
