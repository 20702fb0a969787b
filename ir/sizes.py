"""Sizes and types of traced values in our terms."""

from __future__ import annotations

from typing import Any

from .types import DTYPE_NAMES, Dim, Size, TensorType, Type


class Unstatable(Exception):
    """A size or an element type that the graph cannot state."""


def size_from(value: Any, symbol: str) -> Size:
    """An ``int`` or ``SymInt`` of a trace as a size, where ``symbol`` is the trace's name for the dim ``T``.

    Raises:
        Unstatable: it is not affine in the number of tokens.
    """
    if isinstance(value, int):
        return value
    expression = value.node.expr
    terms: dict[str, int] = {}
    offset = 0
    for term, factor in expression.as_coefficients_dict().items():
        if term.is_number:
            offset += int(term * factor)
        elif str(term) == symbol:
            terms["T"] = int(factor)
        else:
            raise Unstatable(f"a size {expression} depends on the data, or not linearly on the number of tokens")
    return Dim.build(terms, offset)


def type_from(value: Any, symbol: str) -> Type:
    """The type of a fake tensor, or of several.

    Raises:
        Unstatable: its element type or a size has no form in the graph.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_tensor(item, symbol) for item in value)
    return _tensor(value, symbol)


def _tensor(value: Any, symbol: str) -> TensorType:
    if value.dtype not in DTYPE_NAMES:
        raise Unstatable(f"values of type {value.dtype} are not supported")
    return TensorType(DTYPE_NAMES[value.dtype], tuple(size_from(size, symbol) for size in value.shape))
