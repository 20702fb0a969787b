"""Type inference: run an operator on the ``meta`` device at a few sizes of the dynamic dims and read off the type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .graph import dims_of
from .schemes import scheme_of
from .types import DTYPE_NAMES, Dim, TensorType, Type, concrete_args

# Large enough that no branch for tiny sizes is taken, and odd, so that nothing divides it by accident.
_PROBE = 97
# Calls that are remembered: many times those of one model and its passes.
_MOST_KNOWN = 20_000
_known: dict[Any, Type] = {}


class TypeInferenceError(ValueError):
    """The operator does not accept arguments of these types."""


def infer(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Type:
    """The type of ``target(*args, **kwargs)``, where nodes among the arguments stand for values of their type.

    Equal calls, as in equal layers and in a graph after each pass, are inferred once: the type follows from the operator and
    the types of its arguments alone.

    Raises:
        TypeInferenceError: the call fails, or its shape is not affine in the dims.
    """
    key = (target, _key(args), _key(kwargs))
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = _infer(target, args, kwargs)
    return found


def _key(value: Any) -> Any:
    if isinstance(value, Node):
        return value.meta["type"]
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), value)


def _infer(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Type:
    own = getattr(target, "infer_type", None)
    if own is not None:
        return own(*args, **kwargs)  # type: ignore[no-any-return]
    types: list[Type] = []
    constants: list[TensorType] = []
    _walk(args, types, constants)
    _walk(kwargs, types, constants)
    names = sorted(dims_of(types) | dims_of(constants))
    base = dict.fromkeys(names, _PROBE)
    at_base = _run(target, args, kwargs, base)
    moved = {name: _run(target, args, kwargs, {**base, name: _PROBE + 2}) for name in names}
    results: list[TensorType] = []
    for position, (dtype, shape) in enumerate(at_base):
        sizes = []
        for axis, size in enumerate(shape):
            factors = {name: moved[name][position][1][axis] - size for name in names}
            if any(factor % 2 for factor in factors.values()):
                raise TypeInferenceError(f"size {axis} of the result is not affine in {', '.join(names)}")
            halves = {name: factor // 2 for name, factor in factors.items()}
            sizes.append(Dim.build(halves, size - sum(factor * _PROBE for factor in halves.values())))
        results.append(TensorType(dtype, tuple(sizes)))
    return tuple(results) if len(results) != 1 or _is_tuple(target) else results[0]


def _is_tuple(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and (len(schema.returns) > 1 or "[]" in str(schema.returns[0].type))


def _walk(value: Any, types: list[Type], constants: list[TensorType]) -> None:
    if isinstance(value, Node):
        types.append(value.meta["type"])
    elif isinstance(value, Dim):
        constants.append(TensorType("i64", (value,)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _walk(item, types, constants)
    elif isinstance(value, dict):
        for item in value.values():
            _walk(item, types, constants)


def _run(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dims: dict[str, int]
) -> list[tuple[str, tuple[int, ...]]]:
    reading = reading_dtype(args)

    def tensor(kind: TensorType) -> torch.Tensor:
        dtype = reading if scheme_of(kind.dtype) else kind.torch_dtype
        return torch.empty(kind.concrete(dims), dtype=dtype, device="meta")

    concrete_positional = _map(args, tensor, dims)
    concrete_named = _map(kwargs, tensor, dims)
    if target_makes_tensor(target):
        concrete_named["device"] = "meta"
    try:
        result = target(*concrete_positional, **concrete_named)
    except Exception as error:
        raise TypeInferenceError(str(error).strip().partition("\n")[0]) from error
    outputs = result if isinstance(result, (list, tuple)) else [result]
    return [(DTYPE_NAMES[item.dtype], tuple(item.shape)) for item in outputs]


def reading_dtype(args: Any) -> torch.dtype:
    """The type in which a call reads its quantised operands: that of its rows, or fp32 if they are quantised themselves."""
    for item in args:
        kind = item.meta["type"] if isinstance(item, Node) else None
        if isinstance(kind, TensorType) and scheme_of(kind.dtype):
            return torch.float32
        if isinstance(kind, TensorType) and kind.torch_dtype.is_floating_point:
            return kind.torch_dtype
    return torch.float32


def target_makes_tensor(target: Any) -> bool:
    """Whether the operator creates a tensor from numbers alone and so must be told the device."""
    schema = getattr(target, "_schema", None)
    if schema is None or not any(argument.name == "device" for argument in schema.arguments):
        return False
    return not any("Tensor" in str(argument.type) for argument in schema.arguments)


def _map(value: Any, tensor: Callable[[TensorType], torch.Tensor], dims: dict[str, int]) -> Any:
    if isinstance(value, Node):
        kind = value.meta["type"]
        return tuple(map(tensor, kind)) if isinstance(kind, tuple) else tensor(kind)
    if isinstance(value, (list, tuple)):
        return [_map(item, tensor, dims) for item in value]
    if isinstance(value, dict):
        return {name: _map(item, tensor, dims) for name, item in value.items()}
    return concrete_args(value, dims)
