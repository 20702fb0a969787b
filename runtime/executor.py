"""Runs a lowered graph: each step is a flat list of calls, of which those of equal layers are gone through many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..codegen.exchange import Exchange
from ..codegen.region import RegionView, regions_of
from ..ir.dist import ALONE, Group
from ..ir.graph import Region, is_constant, node_inputs, type_of
from ..ir.infer import target_makes_tensor
from ..ir.interpret import bind_dims, call, read
from ..ir.loop import Loop, Stage
from ..ir.ops import is_collective, op_name
from ..ir.quantized import quantised_inputs
from ..ir.types import Dim
from .columns import gathering
from .liveness import last_uses, overwritten
from .packed import Linear, at
from .step import StepInput

Launch = Callable[..., None]
Instruction = Callable[[list[Any], Mapping[str, int]], None]


@dataclass
class _Stage:
    """Instructions that are run once for each entry of ``fixed``, the constants and caches of that time by slot.

    ``carried`` are slots with the one they are first read from, and the one they are read from after each turn;
    ``labels`` say what each instruction computes.
    """

    fixed: list[list[tuple[int, Any]]]
    instructions: list[Instruction]
    carried: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


class Executor:
    """Calls a lowered graph on ``StepInput``s; returns the logits of the rows asked for, those that the graph makes.

    Args:
        constants: from ``fold_constants``.
        caches: ``[C, kv_heads, head_dim]`` by role and layer (``"k0"``); written in place.
        launches: the launcher of every kernel region; without them, the reference implementations run.
        linears: projections that run on packed weights instead of their reference, for each of their times.
        group: the ranks that run the graph together, as this one sees them.
        exchange: where kernels meet those of other ranks.
    """

    def __init__(
        self,
        loop: Loop,
        constants: Mapping[Node, Sequence[Tensor]],
        caches: Mapping[str, Tensor],
        device: torch.device,
        launches: Mapping[Region, Launch] | None = None,
        linears: Mapping[Node, Sequence[Linear]] | None = None,
        group: Group = ALONE,
        exchange: Exchange | None = None,
    ) -> None:
        self._group = group
        self._exchange = exchange
        self._graph = graph = loop.graph
        self._linears = linears or {}
        self._device = device
        self._caches = caches
        self._inputs: list[tuple[int, str]] = []
        self._slots = {node: slot for slot, node in enumerate(graph.nodes) if node.op != "output"}
        self._linear_slots = {node: len(self._slots) + place for place, node in enumerate(self._linears)}
        views = {view.region: view for view in regions_of(graph)}
        self._views = {region: views[region] for region in views if launches and region in launches}
        self._launches = launches or {}
        expiring = last_uses(loop, self._views)
        self._overwritten = overwritten(loop, self._views)
        self._stages = [self._stage(loop, stage, constants, caches, expiring) for stage in loop.stages]
        result = graph.output_node().args[0]
        if not isinstance(result, Node):
            raise ValueError("a lowered graph returns one value")
        self._result = self._slots[result]

    def _stage(
        self,
        loop: Loop,
        stage: Stage,
        constants: Mapping[Node, Sequence[Tensor]],
        caches: Mapping[str, Tensor],
        expiring: Mapping[Any, list[Node]],
    ) -> _Stage:
        made = _Stage([[] for _ in stage.times], [])
        done: set[Region] = set()

        def fix(slot: int, values: Sequence[Any]) -> None:
            for time, fixed in enumerate(made.fixed):
                fixed.append((slot, at(values, time)))

        for node in stage.nodes:
            slot = self._slots.get(node, -1)
            if node.op == "placeholder":
                self._inputs.append((slot, node.name))
            elif node in constants:
                fix(slot, constants[node])
            elif node.op == "output" or is_constant(node):
                continue
            elif str(node.target) == "cache":
                fix(slot, [caches[loop.cache(node, time)] for time in stage.times])
            elif node in loop.carries:
                made.carried.append((slot, self._slots[node.args[0]], self._slots[loop.carries[node]]))
            else:
                region: Region | None = node.meta.get("region")
                launched = region is not None and region in self._views
                if region is not None and launched:
                    if region in done:
                        continue
                    done.add(region)
                    made.instructions.append(self._launch(self._views[region], self._launches[region]))
                else:
                    if node in self._linears:
                        fix(self._linear_slots[node], self._linears[node])
                    made.instructions.append(self._reference(node))
                freed = [self._slots[item] for item in expiring.get(region if launched else node, ())]
                if freed:
                    made.instructions.append(_free(freed))
                label = f"kernel {region.name}" if region is not None and launched else op_name(node.target)
                made.labels += [label] * (len(made.instructions) - len(made.labels))
        return made

    def into(self, step: StepInput, logits: Tensor) -> None:
        """Write the logits of ``step.rows`` to ``logits``."""
        found = self(step, logits)
        if found is not logits:
            logits.copy_(found)

    def __call__(self, step: StepInput, out: Tensor | None = None) -> Tensor:
        """The logits of ``step.rows``; in ``out`` if a kernel makes them and it is given.

        An exception carries a note that says which operator it came from.
        """
        values: list[Any] = [None] * (len(self._slots) + len(self._linear_slots))
        values[self._result] = out
        for slot, name in self._inputs:
            values[slot] = getattr(step, name)
        dims = bind_dims(self._graph, {name: getattr(step, name) for _, name in self._inputs})
        stage, place = self._stages[0], 0
        if self._exchange is not None:
            self._exchange.begin()
        try:
            with torch.inference_mode():
                for stage in self._stages:
                    for slot, first, _ in stage.carried:
                        values[slot] = values[first]
                    for fixed in stage.fixed:
                        for slot, value in fixed:
                            values[slot] = value
                        for place, instruction in enumerate(stage.instructions):  # noqa: B007
                            instruction(values, dims)
                        handed = [values[later] for _, _, later in stage.carried]
                        for (slot, _, _), value in zip(stage.carried, handed):
                            values[slot] = value
        except Exception as error:
            error.add_note(f"in {stage.labels[place]}" if stage.labels else "before the first operator")
            raise
        return values[self._result]  # type: ignore[no-any-return]

    def poisoned(self) -> Executor:
        """The same after NaN was written to every slot of the caches, which must not be read before it is overwritten.

        Codes have factors, which become NaN.
        """
        for store in self._caches.values():
            if store.is_floating_point():
                store.fill_(float("nan"))
        return self

    def _reference(self, node: Node) -> Instruction:
        out = self._slots[node]
        if node in self._linears:
            linear = self._linear_slots[node]
            grouped = op_name(node.target) == "nn.grouped_linear"
            sources = [self._slots[item] for item in node.args[: 1 + grouped]]

            def packed(values: list[Any], dims: Mapping[str, int]) -> None:
                values[out] = values[linear](*[values[source] for source in sources])

            return packed
        if op_name(node.target) == "dist.all_gather" and self._exchange is not None and _last_of_two(node):
            return self._gathered(node)
        target: Any = node.target
        target = getattr(target, "reference", target)
        if (
            node.kwargs
            or is_collective(node.target)
            or any(quantised_inputs(node))
            or target_makes_tensor(node.target)
            or _has_dims(node.args, lone=op_name(node.target) == "aten.reshape")
            or any(isinstance(item, (list, tuple)) and any(node_inputs(item)) for item in node.args)
        ):
            device, slots, group = self._device, self._slots, self._group

            def general(values: list[Any], dims: Mapping[str, int]) -> None:
                lookup = {item: values[slots[item]] for item in node.all_input_nodes}
                values[out] = call(node, lambda item: read(item, lookup, dims), device, group)

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

    def _gathered(self, node: Node) -> Instruction:
        source, out = self._slots[node.args[0]], self._slots[node]
        gather = gathering(self._group, self._exchange)

        def run(values: list[Any], dims: Mapping[str, int]) -> None:
            values[out] = gather(values[source])

        return run

    def _launch(self, view: RegionView, launch: Launch) -> Instruction:
        inputs = [self._slots[node] for node in view.inputs]
        written = {node: self._slots[source] for node, source in view.in_place.items()}
        fresh = [node for node in view.outputs if node not in written]
        places = [
            (self._slots[node], self._slots.get(self._overwritten.get(node)), type_of(node).stored) for node in fresh
        ]
        kept = [(self._slots[node], source) for node, source in written.items()]
        device = self._device

        def run(values: list[Any], dims: Mapping[str, int]) -> None:
            for slot, source in kept:
                values[slot] = values[source]
            # The result of the graph may have its place already; what another layer left in a slot is still read.
            made = [
                values[slot]
                if slot == self._result and values[slot] is not None
                else torch.empty(kind.concrete(dims), dtype=kind.torch_dtype, device=device)
                if over is None
                else values[over]
                for slot, over, kind in places
            ]
            # Kernels read plain rows; a strided view that reaches one is copied (the report names such views).
            launch(*[values[slot].contiguous() for slot in inputs], *made)
            for (slot, _, _), value in zip(places, made):
                values[slot] = value

        return run


def _last_of_two(node: Node) -> bool:
    """Whether columns of a matrix are gathered."""
    return bool(node.args[1] == 1) and type_of(node).rank == 2


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


def _free(slots: list[int]) -> Instruction:
    def free(values: list[Any], dims: Mapping[str, int]) -> None:
        for slot in slots:
            values[slot] = None

    return free
