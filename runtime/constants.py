"""What depends on weights alone is computed once, when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dist import ALONE, Group
from ..ir.graph import is_constant, type_of
from ..ir.interpret import call, read
from ..ir.loop import Loop
from ..ir.ops import is_collective, op_name
from ..ir.types import TensorType


def fold_constants(
    loop: Loop,
    weights: Mapping[str, Tensor],
    device: torch.device,
    placed: dict[str, Tensor],
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    group: Group = ALONE,
) -> dict[Node, list[Tensor]]:
    """The values that depend on weights alone, for each time that a node is run; only those that a step reads are kept.

    They are on the device and contiguous. ``placed`` are values there by what they are computed from, read as well as
    added to, so that nothing is placed twice. ``group`` is the one that the graph runs in: of what is cut, its rank's part
    is kept.

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
    origins: dict[Node, str] = {}
    work = [
        (node, time, len(stage.times) == 1, time == stage.times[-1])
        for stage in loop.stages
        for nodes in [[node for node in stage.nodes if is_constant(node)]]
        for time in stage.times
        for node in nodes
    ]
    for node, time, once, last in progress(work):
        weight = str(node.target) == "weight"
        if node in handed:
            made, origins[node] = handed.pop(node)
        else:
            origins[node] = origin = loop.origin(node, time) if weight else origin_of(node, origins)
            made = placed.get(origin)
            if made is None and weight:
                made = weight_on(weights, loop.weight(node, time), type_of(node), device)
            elif made is None:
                made = call(node, lambda item: read(item, values, {}), device, group)
            if is_collective(node.target):
                made = made.clone()  # a part must not keep the whole
            made = made.contiguous() if isinstance(made, Tensor) and (node in kept or not weight) else made
            if node in kept:
                placed[origin] = made
        values[node] = made
        if node in kept:
            kept[node].append(made)
        if not last:
            handed.update(dict.fromkeys(handed_on.get(node, ()), (made, origins[node])))
        for source in node.all_input_nodes:
            # A turn of a loop reads again what was made before it.
            if last_use[source] is node and (once or last):
                values.pop(source, None)
    return kept


def weight_on(weights: Mapping[str, Tensor], name: str, kind: TensorType, device: torch.device) -> Tensor:
    """A weight on the device."""
    found = weights[name]
    if found.shape != kind.stored.shape:
        raise ValueError(f"weight {name} has shape {tuple(found.shape)}, the graph says {kind}")
    return found.to(device=device, dtype=kind.torch_dtype)


def origin_of(node: Node, origins: Mapping[Node, str]) -> str:
    """What a value is computed from, as text: equal texts are equal values."""

    def text(item: Any) -> str:
        if isinstance(item, Node):
            return origins[item]
        if isinstance(item, (list, tuple)):
            return f"[{', '.join(map(text, item))}]"
        return repr(item)

    named = "".join(f", {name}={text(item)}" for name, item in node.kwargs.items())
    return f"{op_name(node.target)}({', '.join(map(text, node.args))}{named}): {node.meta['type']}"
