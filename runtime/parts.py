"""What each rank that this process runs holds of a model, and the model that runs on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import is_initialized
from torch.fx import Node

from ..codegen.exchange import Exchange, Places, places_for
from ..ir.dist import ALONE, MEETINGS, Group
from ..ir.graph import Graph, Region, type_of
from ..ir.loop import Loop
from ..ir.ops import is_collective, op_name
from ..ir.placement import VOCABULARY
from .caches import new_caches
from .constants import fold_constants
from .executor import Executor, Launch
from .groups import SimulatedGroup, simulated
from .join import torch_group
from .mpi import RankError, world
from .nccl import NCCLGroup, SymmetricExchange
from .options import OptionError, positive
from .packed import Linear, pack_linears
from .ranks import size_of, started_by_mpi
from .simulated import SimulatedRanks

RankModel = Executor | SimulatedRanks


def groups_of(size: int, simulate: bool, device: torch.device) -> list[Group]:
    """The ranks that this process runs: all of them, or its own.

    Raises:
        OptionError: the number makes no sense, or there is nobody to be the other ranks.
    """
    if positive("tensor_parallel", size) == 1:
        return [ALONE]
    if simulate and device.type != "cpu":
        raise OptionError(f"simulate=True: all ranks run on the CPU, not on {device}: pass device='cpu'")
    if simulate:
        return simulated(size)
    by_torch = is_initialized() or (size_of() is not None and not started_by_mpi())
    return [torch_group(size, device) if device.type == "cuda" or by_torch else world(size)]


def agreed(groups: Sequence[Group], value: int) -> int:
    """The least of what the ranks say, if each runs in a process of its own."""
    if len(groups) > 1:
        return value
    return int(min(item.item() for item in groups[0].all_gather(torch.tensor([value]))))


def said_by_first(groups: Sequence[Group], text: str) -> str:
    """What the first of the ranks says, if each runs in a process of its own."""
    if len(groups) > 1 or groups[0].size == 1:
        return text
    said = torch.tensor(list(text.encode()), dtype=torch.uint8)
    room = torch.zeros(-agreed(groups, -len(said)), dtype=torch.uint8)
    room[: len(said)] = said
    return bytes(groups[0].all_gather(room)[0].tolist()).rstrip(b"\0").decode()


def exchange_of(groups: Sequence[Group], loop: Loop) -> SymmetricExchange | None:
    """How the kernels of a model meet those of the other ranks, if they do. All ranks call this together."""
    first = groups[0]
    return first.connect(places_of(loop)) if isinstance(first, NCCLGroup) else None


def places_of(loop: Loop) -> Places:
    """Room for the meetings of the ranks in a step of a whole model; if it returns logits in parts, one is for the choice."""
    meetings = sum(
        len(stage.times) for stage in loop.stages for node in stage.nodes if op_name(node.target) in MEETINGS
    )
    return places_for(loop.graph, meetings + (VOCABULARY in loop.graph.options))


def check_alike(group: Group, graph: Graph) -> None:
    """Check that the ranks, each of which compiles for itself, meet in the same places and hold the same parts.

    Raises:
        RankError: they do not; tokens would be wrong, or none come.
    """
    met: list[str] = []
    cut: list[str] = []
    for node in graph.calls():
        if is_collective(node.target):
            rest = [item for item in node.args if not isinstance(item, Node)]
            (met if op_name(node.target) in MEETINGS else cut).append(f"{op_name(node.target)} {type_of(node)} {rest}")
    text = "\n".join([*met, *sorted(cut), str(graph.options.get(VOCABULARY))])
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    found = [item.item() for item in group.all_gather(torch.tensor([own]))]
    if len(set(found)) > 1:
        others = ", ".join(str(rank) for rank, digest in enumerate(found) if digest != own)
        raise RankError(
            f"rank {group.rank} of {group.size} has compiled another graph than rank {others}: start all with the same "
            "versions, options and PYTHONHASHSEED"
        )


@dataclass(frozen=True)
class Part:
    """One rank's ``constants`` of a loop by node and time, and the projections laid out for the CPU."""

    loop: Loop
    group: Group
    constants: dict[Node, list[Tensor]]
    linears: dict[Node, list[Linear]] = field(default_factory=dict)


def place_parts(
    loop: Loop,
    few: Loop,
    weights: Mapping[str, Tensor],
    place: torch.device,
    rounded: Mapping[str, Tensor],
    groups: Sequence[Group],
    progress: Callable[[list[Any]], Iterable[Any]],
) -> tuple[list[Part], list[Part]]:
    """Place the weights of every rank: the parts of ``loop`` and those of ``few``, which shares what it can with it.

    ``rounded`` are values that are known already, by what they are computed from.
    """
    parts, few_parts = [], []
    for group in groups:
        placed = dict(rounded)
        constants = fold_constants(loop, weights, place, placed, progress, group)
        if few is not loop:
            few_parts.append(Part(few, group, fold_constants(few, weights, place, placed, group=group)))
        parts.append(Part(loop, group, constants, pack_linears(loop, constants)[0]))
    return parts, few_parts or parts


def model_on(
    parts: Sequence[Part],
    num_slots: int,
    place: torch.device,
    launches: Mapping[Region, Launch] | None,
    exchange: Exchange | None = None,
) -> RankModel:
    """The model of the ranks with new caches of ``num_slots``, whose kernels meet in ``exchange``."""
    executors = [
        Executor(
            part.loop,
            part.constants,
            new_caches(part.loop, num_slots, place),
            place,
            launches,
            part.linears,
            part.group,
            exchange,
        )
        for part in parts
    ]
    first = parts[0].group
    if not isinstance(first, SimulatedGroup):
        return executors[0]
    return SimulatedRanks(executors, first.meeting, VOCABULARY in parts[0].loop.graph.options)
