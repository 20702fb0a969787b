"""Rewrites of the graph: rules, merges, paging, and grouping into kernels. ``run`` applies them by name."""

from ..ir.placement import OPTION as TENSOR_PARALLEL
from .cache_rounding import OPTION as KV_DTYPE
from .ledger import PassReport, Refusal
from .model_plan import OPTION as MODEL_PLAN
from .model_plan import ModelPlan, choices_of, compare, plan_of
from .pipeline import NEEDED, PASSES, RULES, Step, apply, run, steps
from .quantize import OPTION as QUANTIZATION
from .quantize import SMOOTHING, spelled, wanted_of
from .registry import GraphPass, UnknownPassError
from .rule import Reject, Rule, rule
from .shard import EXPERT_PARALLEL, REPLICATED
from .sink_cuts import CALIBRATION
from .switches import Switches, switches
from .verification import verified

register = PASSES.register

__all__ = [
    "CALIBRATION",
    "EXPERT_PARALLEL",
    "KV_DTYPE",
    "MODEL_PLAN",
    "NEEDED",
    "PASSES",
    "QUANTIZATION",
    "REPLICATED",
    "RULES",
    "SMOOTHING",
    "TENSOR_PARALLEL",
    "GraphPass",
    "ModelPlan",
    "PassReport",
    "Refusal",
    "Reject",
    "Rule",
    "Step",
    "Switches",
    "UnknownPassError",
    "apply",
    "choices_of",
    "compare",
    "plan_of",
    "register",
    "rule",
    "run",
    "spelled",
    "steps",
    "switches",
    "verified",
    "wanted_of",
]
