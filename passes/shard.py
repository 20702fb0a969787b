"""Shard: the graph says which part of each value a rank holds, and where ranks have to meet."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.dist import padded
from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, type_of
from ..ir.ops import is_collective, resolve
from ..ir.placement import OPTION, PARTIAL, Placement, Routed, Shard, annotate, shape_of
from ..ir.quantized import is_quantised
from .absmax import drop_absmax, give_absmax
from .heads import repeat_heads
from .ledger import PassReport, Refusal
from .lookups import divide_lookups, is_lookup
from .model_plan import GATHERED, WHOLE, chosen
from .padding import pad_vocabulary
from .partition import Plan, Site, plan_for
from .projections import fits, is_grouped, rows_and_weight
from .quantize import matrices_of
from .sink_cuts import sink_cuts

REPLICATED = "replicated"
"""The option that lists patterns of weights that are not to be cut."""

EXPERT_PARALLEL = "expert_parallel"
"""The option that lists patterns of weights of experts of which each rank is to have some of the experts."""


def shard(graph: Graph, report: PassReport) -> Graph:
    """Divide the graph among as many ranks as its option ``tensor_parallel`` says (Shoeybi et al. 2019, "Megatron-LM").

    Shapes stay whole; types say after ``@`` what a rank holds. Weights are cut by ``dist.shard``; a sum of parts that
    something else than a sum reads goes through ``dist.all_reduce``, and parts of the result through ``dist.all_gather``.
    Where a rank has some of the experts, ``dist.route`` says which tokens go to these.
    A vocabulary that cannot be divided is padded; what else cannot is computed whole by every rank, and the report says why.

    Raises:
        UnsupportedModelError: a pattern of weights that are not to be cut, or to be cut between experts, fits none.
    """
    ranks = graph.options.get(OPTION, 1)
    if ranks == 1 or any(is_collective(node.target) for node in graph.calls()):
        return graph
    repeat_heads(graph, ranks)
    patterns, by_expert = _patterns(graph, REPLICATED), _patterns(graph, EXPERT_PARALLEL)
    whole = dict.fromkeys(chosen(graph, WHOLE), "the model's own plan keeps it whole")
    whole |= {item: f"{item!r} is not to be cut" for item in patterns}

    def why_whole(weight: Node) -> str:
        return next((why for item, why in whole.items() if fits(item, matrices_of(weight))), "")

    def may_be_cut(weight: Node) -> bool:
        return not why_whole(weight)

    kept = divide_lookups(graph, ranks, why_whole, report)
    pad_vocabulary(graph, ranks, may_be_cut, report)
    give_absmax(graph, ranks, may_be_cut)
    plan = plan_for(graph, ranks, whole, report, chosen(graph, GATHERED), by_expert)
    plan.kept.update(kept)
    unused = [item for item in patterns if whole[item] not in plan.kept.values()]
    if unused:
        raise UnsupportedModelError(
            f"tensor_parallel: {unused[0]!r} fits the name of no projection's weight, nor of a table"
        )
    experts = [matrices_of(rows_and_weight(node)[1]) for node in graph.calls() if is_grouped(node)]
    unused = [item for item in by_expert if not any(fits(item, names) for names in experts)]
    if unused:
        raise UnsupportedModelError(f"expert_parallel: {unused[0]!r} fits the name of no weight of experts")
    _tell(graph, plan, ranks, report)
    _write(graph, plan)
    drop_absmax(graph)
    sink_cuts(graph)
    return graph


def _patterns(graph: Graph, option: str) -> list[str]:
    return [item for item in str(graph.options.get(option, "")).split(", ") if item]


def _tell(graph: Graph, plan: Plan, ranks: int, report: PassReport) -> None:
    """Report what is cut, and what is not as it might be."""
    for node, why in plan.kept.items():
        if why:
            report.refuse(node.name, f"every rank computes it whole: {why}", node)
    for node, why in plan.gathered.items():
        if node in plan.column:
            report.near.append(Refusal(node.name, f"its outputs are cut, and its inputs gathered: {why}"))
    for node, why in plan.instead.items():
        how = "its experts are cut" if node in plan.experts else "each of its experts is cut"
        report.near.append(Refusal(node.name, f"{how}: {why}"))
    for node in plan.experts:
        count: Any = shape_of(rows_and_weight(node)[1])[0]
        if count % ranks:
            why = f"{count} cannot be divided among {ranks} ranks"
            report.near.append(Refusal(node.name, f"padded to {padded(count, ranks)} experts, since {why}"))
    cut = {*plan.column, *plan.row, *plan.experts}
    report.fused += [node.name for node in graph.calls() if node in cut or is_lookup(node)]


def _write(graph: Graph, plan: Plan) -> None:
    """State the placements, and put in the operators that change them."""
    made: dict[tuple[Node, Placement], Node] = {}
    for node, placement in plan.placed.items():
        for site in plan.moves.get(node, ()):
            if site not in made:
                made[site] = _moved(graph, node, site, plan)
            node.replace_input_with(site[0], made[site])
        if node.op == "call_function":
            annotate(node, placement)


def _moved(graph: Graph, user: Node, site: Site, plan: Plan) -> Node:
    """An operand, placed as a user needs it, in front of that user."""
    operand, wanted = site
    before = plan.placed[operand]
    args: tuple[object, ...] = (operand,)
    if isinstance(wanted, Shard):
        name, suffix, args = "dist.shard", "part", (operand, wanted.dim, list(wanted.sections))
        kind = type_of(operand)
        if is_quantised(operand) and wanted.dim == kind.rank - 1:
            name, args = "dist.shard_columns", (operand, kind.dtype, list(wanted.sections))
    elif isinstance(wanted, Routed):
        name, suffix, args = "dist.route", "routed", (operand, wanted.experts)
    elif wanted == PARTIAL:
        name, suffix = "dist.on_first", "once"
    elif isinstance(before, Shard):
        name, suffix, args = "dist.all_gather", "gathered", (operand, before.dim)
    else:
        name, suffix = "dist.all_reduce", "reduced"
    node = insert_before(graph, user, resolve(name), args, name=f"{operand.name}_{suffix}", source="Shard")
    annotate(node, wanted)
    return node
