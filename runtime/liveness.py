"""When the values of a step are read for the last time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from ..codegen.region import RegionView
from ..ir.graph import Region, is_constant
from ..ir.loop import Loop


def last_uses(loop: Loop, views: Mapping[Region, RegionView]) -> dict[Any, list[Node]]:
    """The values that are read for the last time by a node (or by a kernel region of ``views``).

    Values that outlive a turn of a loop are left out.
    """
    stages = {node: place for place, stage in enumerate(loop.stages) for node in stage.nodes}
    seen = set(loop.carries.values())
    found: dict[Any, list[Node]] = {}
    for node in reversed(list(loop.graph.nodes)):
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
                and node not in loop.carries
                and (stages[source] == stages[node] or len(loop.stages[stages[node]].times) == 1)
            ):
                if inside and source.meta.get("region") == region:
                    continue
                found.setdefault(region if inside else node, []).append(source)
    return found
