"""When the values of a step are read for the last time, and which results take their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from ..codegen.region import RegionView
from ..codegen.reuse import overwritable
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


def overwritten(loop: Loop, views: Mapping[Region, RegionView]) -> dict[Node, Node]:
    """The results of kernel regions that are written over a value which the same kernel reads for the last time.

    Nobody else may read that memory later: it is the result of another kernel, and no view of it is taken. What the
    first turn of a loop reads must not be read after it.
    """
    expiring = last_uses(loop, views)
    fresh = {node for view in views.values() for node in view.outputs if node not in view.in_place}
    places = {node: place for place, node in enumerate(loop.graph.nodes)}
    handed = list(loop.carries.values())

    def alone(node: Any) -> bool:
        readers = [user for user in node.users if user not in loop.carries and user.op != "output"]
        return all(user.meta.get("region") in views for user in readers)

    def replaceable(node: Node) -> bool:
        if node not in loop.carries:
            return node in fresh and alone(node)
        first, last = node.args[0], loop.carries[node]
        assert isinstance(first, Node)
        whole = all(item in fresh and alone(item) for item in (first, last)) and alone(node)
        return whole and handed.count(last) == 1 and all(places[user] <= places[node] for user in first.users)

    return {
        result: source
        for region, view in views.items()
        for result, source in overwritable(view).items()
        if source in expiring.get(region, ()) and replaceable(source)
    }
