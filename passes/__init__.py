"""Rewrites of the graph: rules, merges, paging, and grouping into kernels. ``run`` applies them by name."""

from .ledger import PassReport, Refusal
from .pipeline import NEEDED, PASSES, RULES, Step, apply, run, steps
from .registry import GraphPass, UnknownPassError
from .rule import Reject, Rule, rule
from .switches import Switches, switches
from .verification import verified

register = PASSES.register

__all__ = [
    "NEEDED",
    "PASSES",
    "RULES",
    "GraphPass",
    "PassReport",
    "Refusal",
    "Reject",
    "Rule",
    "Step",
    "Switches",
    "UnknownPassError",
    "apply",
    "register",
    "rule",
    "run",
    "steps",
    "switches",
    "verified",
]
