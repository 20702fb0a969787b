"""The operators of the graph: ATen overloads under their own names, and Fuseline's own operators.

Every target of a node is either an ATen overload (``aten.linear``, ``aten.mul.Tensor``) or an ``Op`` registered here
(``nn.rms_norm``). Both are callables on tensors: calling the target is its reference implementation.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Op:
    """An operator of our own.

    ``reference`` computes it with torch on any device (the ``meta`` device included, which is how types are
    inferred, unless there is ``infer_type``, which makes the type from the arguments' nodes). ``pure`` is false for
    operators that write to an argument in place.
    """

    name: str
    reference: Callable[..., Any]
    pure: bool = True
    parameters: tuple[inspect.Parameter, ...] = field(default=(), repr=False)
    infer_type: Callable[..., Any] | None = field(default=None, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reference(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


_REGISTRY: dict[str, Op] = {}


def register(
    name: str, *, pure: bool = True, infer_type: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Register the decorated function as the reference implementation of the operator ``name``."""

    def wrap(reference: Callable[..., Any]) -> Op:
        parameters = tuple(inspect.signature(reference).parameters.values())
        op = Op(name, reference, pure, parameters, infer_type)
        if name in _REGISTRY:
            raise ValueError(f"operator {name} is registered twice")
        _REGISTRY[name] = op
        return op

    return wrap


def op_name(target: Any) -> str:
    """The name of a target in the text form; the ``default`` overload of an ATen operator is left out."""
    if isinstance(target, Op):
        return target.name
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, str):  # inputs and the output
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    raise TypeError(f"{target!r} is no operator of the graph")


@cache
def _overload_name(target: torch._ops.OpOverload) -> str:
    name = f"{target.namespace}.{target._schema.name.rpartition('::')[2]}"
    overload = target._overloadname
    return name if overload == "default" else f"{name}.{overload}"


def resolve(name: str) -> Any:
    """The target that a name in the text form stands for.

    Raises:
        KeyError: there is no such operator.
    """
    return _REGISTRY[name] if name in _REGISTRY else _aten(name)


@cache
def _aten(name: str) -> Any:
    namespace, _, rest = name.partition(".")
    if namespace != "aten" or not rest:
        raise KeyError(name)
    packet_name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, packet_name, None)
    if packet is None or (overload or "default") not in packet.overloads():
        raise KeyError(name)
    return getattr(packet, overload or "default")


def aten(name: str) -> Any:
    """The ATen overload of that name without its namespace: ``aten("mul.Tensor")``."""
    return resolve(f"aten.{name}")


def is_pure(target: Any) -> bool:
    """Whether the operator leaves its arguments as they are."""
    return target.pure if isinstance(target, Op) else True


def is_collective(target: Any) -> bool:
    """Whether the operator is one of a group of ranks, which it is given as ``group``; see ``dist``."""
    return isinstance(target, Op) and target.name.startswith("dist.")


LOOKUPS = frozenset({"aten.embedding", "nn.lookup"})
"""Operators that read rows of a table, their first operand, by the ids that are their second."""
PROJECTIONS = frozenset({"aten.linear", "nn.scaled_linear"})
"""Products of rows with a matrix ``[N, K]``, their first two operands; the third, if there is one, is a bias."""

COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})

# One output element for each element of the broadcast inputs. Codegen prints each as one expression on a tile.
POINTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor sub.Tensor mul.Tensor div.Tensor neg abs exp exp2 log log2 log1p rsqrt sqrt reciprocal "
        "cos sin tanh sigmoid relu "
        "silu softplus erf pow.Tensor_Scalar pow.Scalar square clamp clamp_min clamp_max maximum minimum to.dtype gelu "
        "rsub.Scalar where.self where.ScalarSelf where.ScalarOther where.Scalar "
        "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar "
        "eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor "
        "logical_and logical_or logical_not bitwise_and.Tensor bitwise_or.Tensor bitwise_not masked_fill.Scalar "
        "leaky_relu hardtanh elu hardsigmoid hardswish mish relu6 log_sigmoid logit floor ceil round sign "
        "zeros_like ones_like full_like expm1 floor_divide remainder.Scalar remainder.Tensor "
        "celu selu atan tan sinh cosh"
    ).split()
)
