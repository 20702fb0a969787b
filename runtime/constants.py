"""What depends on weights alone is computed once, when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.graph import is_constant, type_of
from ..ir.interpret import call, read
from ..ir.loop import Loop


def fold_constants(
    loop: Loop,
    weights: Mapping[str, Tensor],
    device: torch.device,
    placed: dict[str, Tensor],
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[Node, list[Tensor]]:
    """The values that depend on weights alone, for each time that a node is run; only those that a step reads are kept.

    They are on the device and contiguous. ``placed`` are weights there by name, read as well as added to, so that no
    weight is placed twice.

    Raises:
        KeyError: a weight is missing. ValueError: a weight has another shape than the graph says.
    """
    constants = [node for node in loop.graph.calls() if is_constant(node)]
    last_use = {source: node for node in constants for source in node.all_input_nodes}
    kept: dict[Node, list[Tensor]] = {
        node: [] for node in constants if any(not is_constant(user) for user in node.users)
    }
    handed_on: dict[Node, list[Node]] = {}
    for carry, later in loop.carries.items():
        handed_on.setdefault(later, []).append(carry)
    values: dict[Node, Any] = {}
    handed: dict[Node, Any] = {}
    work = [
        (node, time, len(stage.times) == 1, time == stage.times[-1])
        for stage in loop.stages
        for nodes in [[node for node in stage.nodes if is_constant(node)]]
        for time in stage.times
        for node in nodes
    ]
    for node, time, once, last in progress(work):
        if str(node.target) == "weight":
            name, kind = loop.weight(node, time), type_of(node)
            made = placed.get(name)
            if made is None:
                made = weights[name]
                if made.device != device or made.dtype != kind.torch_dtype:
                    made = made.to(device=device, dtype=kind.torch_dtype)
                if node in kept:
                    placed[name] = made
            if made.shape != kind.shape:
                raise ValueError(f"weight {name} has shape {tuple(made.shape)}, the graph says {kind}")
        elif node in handed:
            made = handed.pop(node)
        else:
            made = call(node, lambda item: read(item, values, {}), device)
            made = made.contiguous() if isinstance(made, Tensor) else made
        values[node] = made
        if node in kept:
            kept[node].append(made.contiguous())
        if not last:
            handed.update(dict.fromkeys(handed_on.get(node, ()), made))
        for source in node.all_input_nodes:
            # A turn of a loop reads again what was made before it.
            if last_use[source] is node and (once or last):
                values.pop(source, None)
    return kept
