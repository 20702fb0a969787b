"""What depends on weights and numbers alone is computed once, when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from ..ir.weights import LazyWeights


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
    is kept, and of ``LazyWeights`` that are cut where they are read, only that is read.

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
    work = [
        (node, time, len(stage.times) == 1, time == stage.times[-1])
        for stage in loop.stages
        for nodes in [[node for node in stage.nodes if is_constant(node)]]
        for time in stage.times
        for node in nodes
    ]
    origins, needed = _needed([(node, time, last) for node, time, _, last in work], loop, kept, handed_on, placed)
    values: dict[Node, Any] = {}
    handed: dict[Node, Any] = {}
    names: dict[Node, str] = {}
    for place, (node, time, once, last) in progress(list(enumerate(work))):
        weight = str(node.target) == "weight"
        origin = origins[place]
        if weight:
            names[node] = loop.weight(node, time)
        if node in handed:
            made = handed.pop(node)
        else:
            made = placed.get(origin)
            if made is None and needed[place] and not read_in_parts(node, loop, weights):
                if weight:
                    made = weight_on(weights, names[node], type_of(node), device)
                elif any(read_in_parts(source, loop, weights) for source in node.all_input_nodes):
                    made = _part_on(weights, names, node, group, device)
                else:
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
            handed.update(dict.fromkeys(handed_on.get(node, ()), made))
        for source in node.all_input_nodes:
            # A turn of a loop reads again what was made before it.
            if last_use[source] is node and (once or last):
                values.pop(source, None)
    return kept


def _needed(
    work: Sequence[tuple[Node, int, bool]],
    loop: Loop,
    kept: Collection[Node],
    handed_on: Mapping[Node, Sequence[Node]],
    placed: Collection[str],
) -> tuple[list[str], list[bool]]:
    """What each value is computed from, and whether it has to be computed: not if all that reads it is placed already."""
    origins: list[str] = []
    sources: list[list[int]] = []
    at: dict[Node, int] = {}
    handed: dict[Node, int] = {}
    of: dict[Node, str] = {}
    copies: set[int] = set()  # of what the turn before handed on
    for place, (node, time, last) in enumerate(work):
        if node in handed:
            sources.append([handed.pop(node)])
            copies.add(place)
            of[node] = origins[sources[-1][0]]
        else:
            sources.append([at[source] for source in node.all_input_nodes])
            of[node] = loop.origin(node, time) if str(node.target) == "weight" else origin_of(node, of)
        origins.append(of[node])
        at[node] = place
        if not last:
            handed.update(dict.fromkeys(handed_on.get(node, ()), place))
    needed, known, placed_before = [False] * len(work), set(placed), set[int]()
    for place, (node, _, _) in enumerate(work):
        if origins[place] in known and place not in copies:
            placed_before.add(place)
        elif node in kept:
            needed[place] = True
            if place not in copies:
                known.add(origins[place])
    for place in range(len(work) - 1, -1, -1):
        if needed[place] and place not in placed_before:
            for source in sources[place]:
                needed[source] = True
    return origins, needed


def read_in_parts(node: Node, loop: Loop, weights: Mapping[str, Tensor]) -> bool:
    """Whether a weight is read where it is cut, a rank's part at a time, and never held whole."""
    return (
        isinstance(weights, LazyWeights)
        and str(node.target) == "weight"
        and node not in loop.carries.values()
        and all(op_name(user.target) == "dist.shard" and len(user.args) > 3 for user in node.users)
    )


def _part_on(
    weights: Mapping[str, Tensor], names: Mapping[Node, str], node: Node, group: Group, device: torch.device
) -> Tensor:
    """This rank's part of a weight, as ``dist.shard`` gives it."""
    source, dim, sections, ranks = node.args
    assert isinstance(weights, LazyWeights) and isinstance(source, Node)
    if ranks != group.size:
        raise LookupError(f"the graph is that of one of {ranks} ranks, and the group has {group.size}")
    found = weights.part(names[source], dim, sections, group.size, group.rank)  # type: ignore[arg-type]
    kind = type_of(node)
    if found.shape != kind.stored.shape:
        raise ValueError(f"weight {names[source]} has a part of shape {tuple(found.shape)}, the graph says {kind}")
    return found.to(device=device, dtype=kind.torch_dtype)


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
