"""Runs a lowered graph: constants are folded once, then each step is a flat list of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..codegen.region import RegionView, regions_of
from ..ir.graph import Graph, Region, flat_types, is_constant, node_inputs, type_of
from ..ir.infer import target_makes_tensor
from ..ir.interpret import bind_dims, call, read
from ..ir.ops import op_name
from ..ir.types import Dim, TensorType
from .packed import Linear
from .step import StepInput

Launch = Callable[..., None]
Instruction = Callable[[list[Any], Mapping[str, int]], None]


def fold_constants(
    graph: Graph,
    weights: Mapping[str, Tensor],
    device: torch.device,
    progress: Callable[[Iterable[Node]], Iterable[Node]] = iter,
) -> dict[Node, Tensor]:
    """The values that depend on weights alone, on the device and contiguous; only those that a step reads are kept.

    Raises:
        KeyError: a weight is missing.
    """
    constants = [node for node in graph.calls() if is_constant(node)]
    last_use = {source: node for node in constants for source in node.all_input_nodes}
    kept = {node for node in constants if any(not is_constant(user) for user in node.users)}
    values: dict[Node, Any] = {}
    placed: dict[str, Tensor] = {}
    for node in progress(constants):
        if str(node.target) == "weight":
            name, kind = str(node.args[0]), type_of(node)
            if name not in placed:
                placed[name] = weights[name].to(device=device, dtype=kind.torch_dtype)
            values[node] = placed[name]
            if tuple(values[node].shape) != kind.shape:
                raise ValueError(f"weight {name} has shape {tuple(values[node].shape)}, the graph says {kind}")
            if node not in kept:
                del placed[name]
        else:
            made = call(node, lambda item: read(item, values, {}), device)
            values[node] = made.contiguous() if isinstance(made, Tensor) else made
        for source in node.all_input_nodes:
            if last_use[source] is node and source not in kept:
                values.pop(source, None)
    return {node: value.contiguous() for node, value in values.items() if node in kept}


class Executor:
    """Calls a lowered graph on ``StepInput``s; returns the logits of the rows asked for.

    Args:
        constants: from ``fold_constants``.
        caches: ``[C, kv_heads, head_dim]`` by role and layer (``"k0"``); written in place.
        launches: the launcher of every kernel region; without them, the reference implementations run.
        linears: projections that run on packed weights instead of their reference.
    """

    def __init__(
        self,
        graph: Graph,
        constants: Mapping[Node, Tensor],
        caches: Mapping[str, Tensor],
        device: torch.device,
        launches: Mapping[Region, Launch] | None = None,
        linears: Mapping[Node, Linear] | None = None,
    ) -> None:
        self._graph = graph
        self._linears = linears or {}
        self._device = device
        self._slots: dict[Node, int] = {}
        self._fixed: list[tuple[int, Tensor]] = []
        self._inputs: list[tuple[int, str]] = []
        self._instructions: list[Instruction] = []
        self._labels: list[str] = []
        self._types = [(name, type_of(graph.input(name))) for name in (node.name for node in graph.inputs())]
        for node in graph.nodes:
            if node.op != "output":
                self._slots[node] = len(self._slots)
        views = {view.region: view for view in regions_of(graph)}
        expiring = last_uses(graph, views if launches else {})
        done: set[Region] = set()
        for node in graph.nodes:
            slot = self._slots.get(node, -1)
            if node.op == "placeholder":
                self._inputs.append((slot, node.name))
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, Node):
                    raise ValueError("a lowered graph returns one value")
                self._result = self._slots[result]
            elif node in constants:
                self._fixed.append((slot, constants[node]))
            elif is_constant(node):
                continue
            elif str(node.target) == "cache":
                self._fixed.append((slot, caches[f"{node.args[0]}{node.args[1]}"]))
            else:
                region = node.meta.get("region")
                if launches and region in launches:
                    if region in done:
                        continue
                    done.add(region)
                    self._instructions.append(self._launch(views[region], launches[region]))
                else:
                    self._instructions.append(self._reference(node))
                freed = [
                    self._slots[item] for item in expiring.get(region if launches and region in launches else node, ())
                ]
                if freed:
                    self._instructions.append(_free(freed))
                label = f"kernel {region.name}" if launches and region in launches else op_name(node.target)
                self._labels += [label] * (len(self._instructions) - len(self._labels))

    def into(self, step: StepInput, logits: Tensor) -> None:
        """Write the logits of ``step.rows`` to ``logits [R, vocab]``."""
        found = self(step, logits)
        if found is not logits:
            logits.copy_(found)

    def __call__(self, step: StepInput, out: Tensor | None = None) -> Tensor:
        """The logits ``[R, vocab]`` of ``step.rows``; in ``out`` if a kernel makes them and it is given.

        An exception carries a note that says which operator it came from.
        """
        values: list[Any] = [None] * len(self._slots)
        values[self._result] = out
        for slot, value in self._fixed:
            values[slot] = value
        for slot, name in self._inputs:
            values[slot] = getattr(step, name)
        dims = bind_dims(self._graph, {name: getattr(step, name) for _, name in self._inputs})
        at = 0
        try:
            with torch.inference_mode():
                for at, instruction in enumerate(self._instructions):  # noqa: B007
                    instruction(values, dims)
        except Exception as error:
            error.add_note(f"in {self._labels[at]}")
            raise
        return values[self._result]  # type: ignore[no-any-return]

    def _reference(self, node: Node) -> Instruction:
        out = self._slots[node]
        if node in self._linears:
            linear, source = self._linears[node], self._slots[node.args[0]]  # type: ignore[index]

            def packed(values: list[Any], dims: Mapping[str, int]) -> None:
                values[out] = linear(values[source])

            return packed
        target: Any = node.target
        target = getattr(target, "reference", target)
        if (
            node.kwargs
            or target_makes_tensor(node.target)
            or _has_dims(node.args, lone=op_name(node.target) == "aten.reshape")
            or any(isinstance(item, (list, tuple)) and any(node_inputs(item)) for item in node.args)
        ):
            device, slots = self._device, self._slots

            def general(values: list[Any], dims: Mapping[str, int]) -> None:
                lookup = {item: values[slots[item]] for item in node.all_input_nodes}
                values[out] = call(node, lambda item: read(item, lookup, dims), device)

            return general
        fixed = [_row_count(item) if not isinstance(item, Node) else None for item in node.args]
        fills = [(place, self._slots[item]) for place, item in enumerate(node.args) if isinstance(item, Node)]
        if len(fills) == len(fixed) == 2:
            (_, first), (_, second) = fills

            def binary(values: list[Any], dims: Mapping[str, int]) -> None:
                values[out] = target(values[first], values[second])

            return binary

        def positional(values: list[Any], dims: Mapping[str, int]) -> None:
            arguments = fixed.copy()
            for place, slot in fills:
                arguments[place] = values[slot]
            values[out] = target(*arguments)

        return positional

    def _launch(self, view: RegionView, launch: Launch) -> Instruction:
        inputs = [self._slots[node] for node in view.inputs]
        written = {node: self._slots[source] for node, source in view.in_place.items()}
        fresh = [(self._slots[node], type_of(node)) for node in view.outputs if node not in written]
        kept = [(self._slots[node], source) for node, source in written.items()]
        device = self._device

        def run(values: list[Any], dims: Mapping[str, int]) -> None:
            for slot, source in kept:
                values[slot] = values[source]
            # The result of the graph may have its place already.
            made = [
                torch.empty(kind.concrete(dims), dtype=kind.torch_dtype, device=device)
                if values[slot] is None
                else values[slot]
                for slot, kind in fresh
            ]
            # Kernels read plain rows; a strided view that reaches one is copied (the report names such views).
            launch(*[values[slot].contiguous() for slot in inputs], *made)
            for (slot, _), value in zip(fresh, made):
                values[slot] = value

        return run


def _row_count(value: Any) -> Any:
    """``T`` in the shape of a reshape may be left to torch: ``-1``."""
    if isinstance(value, (list, tuple)):
        return [_row_count(item) for item in value]
    return -1 if isinstance(value, Dim) else value


def _has_dims(args: Any, lone: bool) -> bool:
    """Whether a dim occurs, other than (if ``lone``) as the one row count in a shape."""
    for item in args:
        if isinstance(item, Dim):
            return True
        if isinstance(item, (list, tuple)) and sum(isinstance(size, Dim) for size in item) > 0:
            sizes = [size for size in item if isinstance(size, Dim)]
            if not lone or len(sizes) > 1 or sizes[0] != Dim.named("T"):
                return True
    return False


def last_uses(graph: Graph, views: Mapping[Region, RegionView]) -> dict[Any, list[Node]]:
    """The values that are read for the last time by a node (or by a kernel region)."""
    seen: set[Node] = set()
    found: dict[Any, list[Node]] = {}
    for node in reversed(list(graph.nodes)):
        region = node.meta.get("region")
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            inside = region is not None and region in views
            if (
                source.op == "call_function"
                and not is_constant(source)
                and str(source.target) != "cache"
                and node.op != "output"
            ):
                if inside and source.meta.get("region") == region:
                    continue
                found.setdefault(region if inside else node, []).append(source)
    return found


def _free(slots: list[int]) -> Instruction:
    def free(values: list[Any], dims: Mapping[str, int]) -> None:
        for slot in slots:
            values[slot] = None

    return free


def new_caches(graph: Graph, num_slots: int, device: torch.device, fill: float | None = None) -> dict[str, Tensor]:
    """Storage for every ``cache(...)`` of a graph, by role and layer."""
    caches = {}
    for node in graph.calls():
        if str(node.target) == "cache":
            kind: TensorType = flat_types(node.meta["type"])[0]
            shape = (num_slots, *(size for size in kind.shape[1:] if isinstance(size, int)))
            store = torch.empty(shape, dtype=kind.torch_dtype, device=device)
            caches[f"{node.args[0]}{node.args[1]}"] = store if fill is None else store.fill_(fill)
    return caches


def cache_bytes_per_token(graph: Graph) -> int:
    """Bytes that one token takes in all caches together."""
    total = 0
    for node in graph.calls():
        if str(node.target) == "cache":
            kind = type_of(node)
            width = 1
            for size in kind.shape[1:]:
                width *= size if isinstance(size, int) else 1
            total += width * kind.torch_dtype.itemsize
    return total
