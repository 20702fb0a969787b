"""What a model itself states about several ranks (``base_model_tp_plan`` of transformers), beside the plan made here.

What is cut is decided by the placements that operators take. From the model's plan comes what is left to choose: a projection
that it keeps whole is kept whole, and outputs that it gathers may be gathered where an operator needs them whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ..ir.graph import Graph, type_of
from .ledger import PassReport
from .partition import fits, is_projection, rows_and_weight
from .quantize import matrices_of

OPTION = "model_plan"
"""The option of a graph that says what the model's plan chooses: ``PATTERN=whole`` or ``PATTERN=gathered``, in a list."""

WHOLE, GATHERED = "whole", "gathered"
_CUTS = {
    "colwise": "column",
    "packed_colwise": "column",
    "colwise_gather_output": "column",
    "rowwise": "row",
    "rowwise_split_input": "row",
}


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that a model states, by pattern of module or weight names; empty if it states none."""
    return dict(getattr(model, "tp_plan", None) or {})


def choices_of(plan: Mapping[str, str], model: PreTrainedModel) -> dict[str, str]:
    """What a model's plan chooses about its linear layers, as an option of its graph; none if it chooses nothing."""
    head = model.get_output_embeddings()  # the graph returns what it makes, which is gathered anyway
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    chosen = {key: how for key, how in plan.items() if any(fits(key, {f"{name}.weight"}) for name in names)}
    found = [f"{key}={WHOLE}" for key, how in chosen.items() if _ours(how) == WHOLE]
    found += [f"{key}={GATHERED}" for key, how in chosen.items() if how == "colwise_gather_output"]
    return {OPTION: ", ".join(found)} if found else {}


def chosen(graph: Graph, what: str) -> list[str]:
    """The patterns of weights that a graph's option says are ``WHOLE`` or may be ``GATHERED``."""
    items = [item.rpartition("=") for item in str(graph.options.get(OPTION, "")).split(", ") if item]
    return [pattern for pattern, _, how in items if how == what]


def compare(plan: Mapping[str, str], graph: Graph, report: PassReport) -> str:
    """How the plan made for a graph, which states placements, is like that of the model; a sentence for each difference.

    ``report`` is that of the pass that made it. What the model states about embeddings, norms and routing is left out.
    """
    why = {
        item.site: item.why.removeprefix("every rank computes it whole: ") for item in (*report.near, *report.refused)
    }
    found: dict[str, dict[str, str]] = {}
    for node in graph.calls():
        if is_projection(node):
            names = matrices_of(rows_and_weight(node)[1])
            here = {"": WHOLE, "partial": "row"}.get(type_of(node).placement, "column")
            for key, how in plan.items():
                if _ours(how) and fits(key, names):
                    found.setdefault(key, {}).setdefault(here, why.get(node.name, ""))
    other = [
        f"{key} is {plan[key]} there, and {here} here" + (f" ({reason})" if reason else "")
        for key, ways in found.items()
        for here, reason in ways.items()
        if here != _ours(plan[key])
    ]
    agreeing = sum(set(ways) == {_ours(plan[key])} for key, ways in found.items())
    return "; ".join([f"agrees with base_model_tp_plan in {agreeing} of {len(found)} kinds of projections", *other])


def _ours(how: str) -> str:
    """What a word of the model's plan is called here; empty if it is not about a projection alone."""
    return WHOLE if how.startswith("replicate") else _CUTS.get(how, "")
