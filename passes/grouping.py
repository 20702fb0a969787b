"""GroupKernels: every matmul takes the work before and after it into its kernel; what is left becomes kernels of rows.

A region holds at most one anchor (matmul, attention, grouped matmul). Growth stops where a value is needed whole: a
norm over the columns of a matmul's result starts the next region.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch.fx import Node

from ..ir.graph import Graph, Region, flat_types, is_constant
from ..ir.ops import op_name
from ..ir.tiles import (
    TILE_LARGEST,
    TILE_MEETINGS,
    is_alone,
    is_matmul,
    is_pointwise,
    is_row_op,
    is_view,
    loose,
    sums_choices,
    why_outside,
)
from .epilogue import epilogue_of, prologue_of, reads_meeting
from .ledger import PassReport
from .ordering import make_contiguous
from .sending import sent_after, take_turns


def group_kernels(graph: Graph, report: PassReport) -> Graph:
    """Put the nodes of a lowered graph into kernel regions and order them so that each region is contiguous."""
    regions: dict[Node, Region] = {}
    count = 0

    def claim(nodes: Iterable[Node], name: str) -> None:
        nonlocal count
        region = Region(name, count)
        count += 1
        for node in nodes:
            regions[node] = region

    _clone_shared_prologues(graph)
    for node in list(graph.calls()):
        if node in regions:
            continue
        if is_matmul(node):
            members, refusal = epilogue_of(node, regions)
            members = prologue_of(node, members, regions) + members + sent_after(graph, members)
            if refusal is not None:
                report.refuse(node.name, *refusal)
            claim(members, stem(node.name))
            report.fused.append(node.name)
        elif is_alone(node):
            claim([node], stem(node.name))
            report.fused.append(node.name)
    for members in _row_regions(graph, regions):
        claim(members, row_name(members))
        report.fused.append(members[-1].name)
    for node in loose(graph):
        if node not in regions and not is_view(node) and op_name(node.target) != "getitem":
            report.refuse(node.name, f"it is in no kernel: {why_outside(node)}", node)
    for node, region in regions.items():
        node.meta["region"] = region
    make_contiguous(graph)
    take_turns(graph)
    return graph


def stem(name: str) -> str:
    """The name of a value without its layer and number: ``l12_gate_up_1`` becomes ``gate_up``."""
    return re.sub(r"_\d+$", "", re.sub(r"^l\d+_", "", name)) or name


# Different numbers stay different. What makes some equal, as masks do, leaves it open which of them are the largest: a kernel
# that looks for these only then would be compared with a reference that may take others.
_APART = frozenset(
    f"aten.{name}"
    for name in "softmax.int sigmoid tanh exp log neg add.Tensor sub.Tensor mul.Tensor div.Tensor to.dtype".split()
)

# What a kernel of rows is called after, the first that occurs in it.
_TITLES = {
    "dist.all_reduce": "all_reduce",
    "dist.receive": "all_reduce",
    "nn.add_rms_norm": "add_norm",
    "nn.rms_norm": "norm",
    "nn.layer_norm": "norm",
    "aten.embedding": "embed",
    "nn.lookup": "embed",
    "aten.cos": "rotary_tables",
    "nn.cache_write": "cache_write",
    "nn.rope": "rope",
    "aten.topk": "route",
    "aten.max.dim": "largest",
    "aten.softmax.int": "softmax",
    "nn.silu_mul": "activation",
    "nn.gelu_mul": "activation",
    "aten.sum.dim_IntList": "sum",
    "nn.absmax": "absmax",
    "nn.quantize": "round",
}


def row_name(members: list[Node]) -> str:
    """A name for a kernel of rows."""
    names = {op_name(node.target) for node in members}
    return next((title for op, title in _TITLES.items() if op in names), stem(members[-1].name))


def _clone_shared_prologues(graph: Graph) -> None:
    """A norm that several matmuls read is computed in each of their kernels: give each its own copy."""
    for node in list(graph.calls()):
        if op_name(node.target) not in ("nn.rms_norm", "nn.layer_norm") or len(node.users) < 2 or reads_meeting(node):
            continue
        users = list(node.users)
        if all(user.op == "call_function" and is_matmul(user) and user.args[0] is node for user in users):
            for user in users[1:]:
                with graph.inserting_before(user):
                    twin = graph.node_copy(node, lambda item: item)
                twin.name = graph._graph_namespace.create_name(node.name, None)
                twin.meta = dict(node.meta)
                user.replace_input_with(node, twin)


def _row_regions(graph: Graph, taken: dict[Node, Region]) -> list[list[Node]]:
    """Connected work on rows of the same space, in graph order."""
    groups: list[list[Node]] = []
    home: dict[Node, int] = {}
    reaches: dict[Node, set[int]] = {}
    for node in graph.calls():
        upstream: set[int] = set()
        for source in node.all_input_nodes:
            upstream |= reaches.get(source, set())
        starts = is_view(node) and not any(source in home for source in node.all_input_nodes)
        if node in taken or is_constant(node) or str(node.target) == "cache" or not is_row_op(node) or starts:
            reaches[node] = upstream | {home[source] for source in node.all_input_nodes if source in home}
            continue
        direct = {home[source] for source in node.all_input_nodes if source in home}
        # Joining a group is safe if nothing of that group reaches this node on a way through other kernels.
        candidates = [index for index in sorted(direct) if index not in upstream and _fits(groups[index], node)]
        # Ranks meet once in a kernel, and on what another has made.
        if candidates and op_name(node.target) not in TILE_MEETINGS:
            index = candidates[-1]
        else:
            groups.append([])
            index = len(groups) - 1
        groups[index].append(node)
        home[node] = index
        reaches[node] = upstream | (direct - {index})
    _join_writes(groups, home, reaches)
    kept = [group for group in map(_without_edges, groups) if group]
    grouped = {node for group in kept for node in group}
    for group in kept:
        _pull_views(graph, group, grouped, taken)
    return kept


def _join_writes(groups: list[list[Node]], home: Mapping[Node, int], reaches: Mapping[Node, set[int]]) -> None:
    """Writes to the caches of one layer share a kernel where neither waits for the other; a joined group is left empty."""
    above = [set().union(*(reaches[node] for node in group)) for group in groups]
    for later, group in enumerate(groups):
        for index in range(later):
            first = groups[index]
            if not (first and _only_writes(first, home) and _only_writes(group, home) and _same_rows(first, group[-1])):
                continue
            if index not in above[later] and later not in above[index]:
                first += group
                above[index] |= above[later]
                group.clear()
                break


def _only_writes(group: list[Node], home: Mapping[Node, int]) -> bool:
    """Whether writes to caches are all that others read of a group."""
    results = [node for node in group if any(home.get(user) != home[node] for user in node.users)]
    return all(op_name(node.target) == "nn.cache_write" for node in results)


def _pull_views(graph: Graph, group: list[Node], grouped: set[Node], taken: dict[Node, Region]) -> None:
    """Views that a group reads become part of it, so that the kernel reads the memory as it lies."""
    place = 0
    while place < len(group):
        node = group[place]
        for source in node.all_input_nodes:
            if source.op != "call_function" or source in grouped or source in taken or is_constant(source):
                continue
            if op_name(source.target) == "aten.reshape" or not is_view(source):
                continue
            if any(user not in group for user in source.users):
                with graph.inserting_before(node):
                    twin = graph.node_copy(source, lambda item: item)
                twin.name = graph._graph_namespace.create_name(source.name, None)
                twin.meta = dict(source.meta)
                node.replace_input_with(source, twin)
                source = twin
            group.insert(place, source)
            grouped.add(source)
            break
        else:
            place += 1


def _fits(group: list[Node], node: Node) -> bool:
    """Whether a kernel of rows takes a value in. What ranks add up is there as whole rows, and nowhere else."""
    if op_name(group[0].target) in TILE_MEETINGS:
        return (
            not is_view(node) and flat_types(node.meta["type"])[0].shape == flat_types(group[0].meta["type"])[0].shape
        )
    if op_name(node.target) in TILE_LARGEST and not all(
        is_view(item) or op_name(item.target) in _APART for item in group
    ):
        return False
    return _same_rows(group, node) or _sums_up(group, node)


def _same_rows(group: list[Node], node: Node) -> bool:
    """Whether a group has such rows; once it has summed some up, only those of the sums are its own."""
    places = [place for place, item in enumerate(group) if sums_choices(item) and item.args[0] in group]
    return any(_rows(item) == _rows(node) for item in group[places[-1] if places else 0 :])


def _sums_up(group: list[Node], node: Node) -> bool:
    """Whether a value is the sum of rows that a group makes, number by number, for nothing else: each is made where it is
    added."""
    if not sums_choices(node) or node.args[0] not in group:
        return False
    alone = all(user is node or user in group for item in group for user in item.users)
    return alone and all(is_pointwise(item) or is_view(item) for item in group)


def _rows(node: Node) -> tuple[object, ...]:
    kind = flat_types(node.meta["type"])[0]
    if op_name(node.target) == "nn.cache_write" and isinstance(node.args[1], Node):
        kind = flat_types(node.args[1].meta["type"])[0]
    return kind.shape[:-1]


def _without_edges(group: list[Node]) -> list[Node]:
    """A group without the views at its end, which are free outside; nothing if only views are left."""
    members = list(group)
    while members and is_view(members[-1]):
        members.pop()
    inside = set(members)
    changed = True
    while changed:
        changed = False
        for node in list(members):
            if is_view(node) and not any(user in inside for user in node.users):
                members.remove(node)
                inside.discard(node)
                changed = True
    return members if any(not is_view(node) for node in members) else []
