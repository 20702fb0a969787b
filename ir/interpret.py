"""Run a graph operator by operator on the reference implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .dist import ALONE, Group
from .graph import Graph, type_of
from .infer import reading_dtype, target_makes_tensor
from .ops import is_collective
from .quantized import dequantize, is_quantised, quantised_inputs, quantize
from .schemes import scheme_of
from .types import Dim, Size, TensorType

Values = Mapping[str, Tensor]


def interpret(
    graph: Graph, inputs: Values, weights: Values, caches: Values | None = None, group: Group = ALONE
) -> tuple[Tensor, ...]:
    """The results of a graph.

    Args:
        inputs: by input name. The dims take the sizes found in them.
        weights: by the name in ``weight(...)``.
        caches: by ``"k0"``, ``"v0"``, ...: role and layer of ``cache(...)``; written in place.
        group: the ranks that run the graph together; this call is that of one of them.

    Raises:
        KeyError: an input, weight or cache is missing.
    """
    dims = bind_dims(graph, inputs)
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            result = read(node.args[0], values, dims)
            return tuple(result) if isinstance(result, (list, tuple)) else (result,)
        values[node] = value_of(node, values, dims, inputs, weights, caches or {}, group)
    raise AssertionError("a graph has an output")


def value_of(
    node: Node,
    values: Mapping[Node, Any],
    dims: Mapping[str, int],
    inputs: Values,
    weights: Values,
    caches: Values,
    group: Group,
) -> Any:
    """What a node gives, from the values of those before it; see ``interpret``."""
    if node.op == "placeholder":
        return inputs[node.name]
    if str(node.target) == "weight":
        return weights[str(node.args[0])]
    if str(node.target) == "cache":
        return caches[f"{node.args[0]}{node.args[1]}"]
    device = next(iter(inputs.values())).device
    return call(node, lambda item: read(item, values, dims), device, group)


def call(node: Node, convert: Callable[[Any], Any], device: torch.device, group: Group = ALONE) -> Any:
    """Call a node's operator on its converted arguments; quantised ones are read as the numbers that they stand for."""
    if any(quantised_inputs(node)):
        plain, dtype = convert, reading_dtype(node.args)

        def convert(item: Any) -> Any:
            value = plain(item)
            return dequantize(value, type_of(item), dtype) if isinstance(item, Node) and is_quantised(item) else value

    kwargs = {name: convert(item) for name, item in node.kwargs.items()}
    if is_collective(node.target):
        kwargs["group"] = group
    if str(node.target) == "const":
        with torch.device(device):
            return node.target(*map(convert, node.args), **kwargs)  # type: ignore[operator]
    if target_makes_tensor(node.target):
        kwargs["device"] = device
    return node.target(*map(convert, node.args), **kwargs)  # type: ignore[operator]


def read(value: Any, values: Mapping[Node, Any], dims: Mapping[str, int]) -> Any:
    """An argument with nodes and dims replaced by their values."""
    if isinstance(value, Node):
        return values[value]
    if isinstance(value, Dim):
        return value.substitute(dims)
    if isinstance(value, (list, tuple)):
        return [read(item, values, dims) for item in value]
    return value


def bind_dims(graph: Graph, inputs: Values) -> dict[str, int]:
    """The size of every dim, read off the inputs.

    Raises:
        ValueError: an input does not fit its type.
    """
    dims: dict[str, int] = {}
    for node in graph.inputs():
        kind, found = type_of(node).stored, inputs[node.name]
        if len(kind.shape) != found.dim() or kind.torch_dtype != found.dtype:
            raise ValueError(f"input {node.name} is {tuple(found.shape)} {found.dtype}, not {kind}")
        for stated, size in zip(kind.shape, found.shape):
            known = _solve(stated, size, dims)
            if known != size:
                raise ValueError(f"input {node.name} is {tuple(found.shape)}, not {kind} with {dims}")
    return dims


def _solve(stated: Size, size: int, dims: dict[str, int]) -> int:
    if isinstance(stated, int):
        return stated
    if len(stated.terms) == 1 and stated.terms[0][0] not in dims:
        name, factor = stated.terms[0]
        dims[name] = (size - stated.offset) // factor
    return stated.substitute(dims)


def random_inputs(graph: Graph, dims: Mapping[str, int], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random values for the inputs and weights of a graph that has no cache: ``(inputs, weights)``.

    Integers are drawn below 4, so that they are valid indices into small tables.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(kind: TensorType) -> Tensor:
        shape = kind.concrete(dims)
        if scheme := scheme_of(kind.dtype):
            return quantize(torch.randn(shape, generator=generator), scheme)
        if kind.torch_dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(kind.torch_dtype)
        return torch.randint(0, 2 if kind.dtype == "bool" else 4, shape, generator=generator).to(kind.torch_dtype)

    inputs = {node.name: draw(type_of(node)) for node in graph.inputs()}
    weights = {str(node.args[0]): draw(type_of(node)) for node in graph.calls() if str(node.target) == "weight"}
    return inputs, weights
