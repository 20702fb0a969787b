"""Rewrites of the graph: rules, merges, paging, and grouping into kernels. ``run`` applies them by name."""

from .ledger import PassReport, Refusal
from .pipeline import PASSES, PIPELINE, RULES, Step, UnknownPassError, run, steps
from .rule import Reject, Rule, rule

__all__ = [
    "PASSES",
    "PIPELINE",
    "RULES",
    "PassReport",
    "Refusal",
    "Reject",
    "Rule",
    "Step",
    "UnknownPassError",
    "rule",
    "run",
    "steps",
]
