"""What a model itself states about several ranks (``base_model_tp_plan`` of transformers, and ``base_model_ep_plan`` about
its experts), beside the plan made here.

What is cut is decided by the placements that operators take. From the model's plan comes what is left to choose: a projection
that it keeps whole is kept whole, and outputs that it gathers may be gathered where an operator needs them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ..ir.graph import Graph, type_of
from .ledger import PassReport
from .projections import fits, is_grouped, is_projection, rows_and_weight
from .quantize import matrices_of

OPTION = "model_plan"
"""The option of a graph that says what the model's plan chooses: ``PATTERN=whole`` or ``PATTERN=gathered``, in a list."""

WHOLE, GATHERED, BY_EXPERT = "whole", "gathered", "by expert"
_CUTS = {
    "colwise": "column",
    "packed_colwise": "column",
    "colwise_gather_output": "column",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "grouped_gemm": BY_EXPERT,
}


@dataclass(frozen=True)
class ModelPlan:
    """What a model states by pattern of module or weight names: ``tensor``, and ``expert`` where experts are divided."""

    tensor: Mapping[str, str] = field(default_factory=dict)
    expert: Mapping[str, str] = field(default_factory=dict)

    @property
    def patterns(self) -> set[str]:
        """All patterns of names; none if the model states nothing."""
        return {*self.tensor, *self.expert}


def plan_of(model: nn.Module) -> ModelPlan:
    """The plan that a model states."""
    return ModelPlan(*(dict(getattr(model, name, None) or {}) for name in ("tp_plan", "ep_plan")))


def choices_of(plan: ModelPlan, model: PreTrainedModel) -> dict[str, str]:
    """What a model's plan chooses about its linear layers, as an option of its graph; none if it chooses nothing."""
    head = model.get_output_embeddings()  # the graph returns what it makes, which is gathered anyway
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    chosen = {key: how for key, how in plan.tensor.items() if any(fits(key, {f"{name}.weight"}) for name in names)}
    found = [f"{key}={WHOLE}" for key, how in chosen.items() if _ours(how) == WHOLE]
    found += [f"{key}={GATHERED}" for key, how in chosen.items() if how == "colwise_gather_output"]
    return {OPTION: ", ".join(found)} if found else {}


def chosen(graph: Graph, what: str) -> list[str]:
    """The patterns of weights that a graph's option says are ``WHOLE`` or may be ``GATHERED``."""
    items = [item.rpartition("=") for item in str(graph.options.get(OPTION, "")).split(", ") if item]
    return [pattern for pattern, _, how in items if how == what]


def compare(plan: ModelPlan, graph: Graph, report: PassReport) -> str:
    """How the plan made for a graph, which states placements, is like that of the model; a sentence for each difference.

    Experts that are divided here are compared with what the model states for that, if it does. ``report`` is that of the
    pass that made the plan. What the model states about embeddings, norms and routing is left out.
    """
    why = {
        item.site: item.why.removeprefix("every rank computes it whole: ") for item in (*report.near, *report.refused)
    }
    plans = {"base_model_tp_plan": plan.tensor, "base_model_ep_plan": plan.expert}
    found: dict[str, dict[str, dict[str, str]]] = {name: {} for name in plans}
    for node in graph.calls():
        if is_projection(node):
            weight = rows_and_weight(node)[1]
            names = matrices_of(weight)
            here = {"": WHOLE, "partial": "row"}.get(type_of(node).placement, "column")
            if is_grouped(node) and type_of(weight).placement == "shard(0)":
                here = BY_EXPERT
            name = "base_model_ep_plan" if here == BY_EXPERT and _about(plan.expert, names) else "base_model_tp_plan"
            for key in _about(plans[name], names):
                found[name].setdefault(key, {}).setdefault(here, why.get(node.name, ""))
    agreeing, other = [], []
    for name, kinds in found.items():
        same = sum(set(ways) == {_ours(plans[name][key])} for key, ways in kinds.items())
        agreeing += [f"with {name} in {same} of {len(kinds)} kinds of projections"] if kinds else []
        other += [
            f"{key} is {plans[name][key]} there, and {here} here" + (f" ({reason})" if reason else "")
            for key, ways in kinds.items()
            for here, reason in ways.items()
            if here != _ours(plans[name][key])
        ]
    return "; ".join([f"agrees {', '.join(agreeing)}", *other]) if agreeing else ""


def _about(plan: Mapping[str, str], names: set[str]) -> list[str]:
    """The patterns by which a plan says how weights of these names are cut."""
    return [key for key, how in plan.items() if _ours(how) and fits(key, names)]


def _ours(how: str) -> str:
    """What a word of the model's plan is called here; empty if it is not about a projection alone."""
    return WHOLE if how.startswith("replicate") else _CUTS.get(how, "")
