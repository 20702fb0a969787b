"""Random graphs of transformer-like fragments through every pass: the numbers and the text must survive.

``FUSELINE_RANDOM_SEED`` moves the seeds, which are the same on every run otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from random_checks import Apply, apply_pass, broken_alone, failure, report
from random_graphs import build, recipe, shrink
from torch.fx import Node

from fuseline import ir, passes
from fuseline.ir.ops import op_name
from fuseline.passes import duplicates

FIRST = int(os.environ.get("FUSELINE_RANDOM_SEED", "0"))
CASES, EACH = 20, 100


@pytest.mark.parametrize("case", range(CASES), ids=lambda case: f"{case}-")
def test_passes_hold_on_random_graphs(case: int) -> None:
    """A pass that changes the numbers of some graph, its text or its input would be found here."""
    for seed in range(FIRST + case * EACH, FIRST + (case + 1) * EACH):
        broken = failure(recipe(seed))
        assert broken is None, report(recipe(seed), broken)


def test_random_graphs_reach_every_pass() -> None:
    """A pass that changes none of the graphs would pass the test above untested."""
    idle = set(passes.PASSES)
    for seed in range(250):
        if idle:
            graph = build(recipe(seed))
            graph.options[passes.TENSOR_PARALLEL] = 1 + seed % 2
            idle -= {step.name for step in passes.steps(graph) if step.report.fused}
    assert not idle


def _after(name: str, change: Callable[[Node], None]) -> Apply:
    """The passes, but what the named one returns is tampered with."""

    def apply(applied: str, graph: ir.Graph) -> ir.Graph:
        made = apply_pass(applied, graph)
        for node in list(made.calls()) if applied == name else ():
            change(node)
        return made

    return apply


def _swapped(op: str) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        if op_name(node.target) == op:
            node.args = (node.args[1], node.args[0], *node.args[2:])

    return change


def _cat_in_another_order(node: Node) -> None:
    if op_name(node.target) == "aten.cat" and node.name.endswith("qkv_weight"):
        node.args = (list(node.args[0])[::-1], *node.args[1:])  # type: ignore[call-overload]


def _other_eps(node: Node) -> None:
    if op_name(node.target) == "nn.layer_norm":
        node.args = (*node.args[:-1], 2e-3)


def _without_window(node: Node) -> None:
    if op_name(node.target) == "nn.paged_attention":
        node.args, node.kwargs = node.args[:8], {}


def _unchecked(name: str) -> Apply:
    """The passes, but one rule does not look at its conditions."""
    found = next(rule for rule in passes.RULES if rule.name == name)

    loose = replace(found, when=None)

    def apply(applied: str, graph: ir.Graph) -> ir.Graph:
        if applied != name:
            return apply_pass(applied, graph)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(passes.PASSES._passes, name, loose)
            return apply_pass(applied, graph)

    return apply


def _patched(name: str, module: object, attribute: str, value: object) -> Apply:
    """The passes, but one with something in its module replaced."""

    def apply(applied: str, graph: ir.Graph) -> ir.Graph:
        with pytest.MonkeyPatch.context() as patch:
            if applied == name:
                patch.setattr(module, attribute, value)
            return apply_pass(applied, graph)

    return apply


def _without_numbers(value: object) -> object:
    """What MergeDuplicates compares, but for numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_without_numbers, value))
    return value if isinstance(value, (Node, str)) else None


BROKEN: dict[str, tuple[str, Apply]] = {
    "gate and up swapped": ("FuseSiluMul", _after("FuseSiluMul", _swapped("nn.silu_mul"))),
    "weights in another order": ("MergeQKV", _after("MergeQKV", _cat_in_another_order)),
    "another eps": ("FuseLayerNorm", _after("FuseLayerNorm", _other_eps)),
    "the window forgotten": ("PageAttention", _after("PageAttention", _without_window)),
    "any factor taken for a scale": ("FuseNormScale", _unchecked("FuseNormScale")),
    "calls that differ in a number taken for equal": (
        "MergeDuplicates",
        _patched("MergeDuplicates", duplicates, "_key", _without_numbers),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_pass_is_found(what: str) -> None:
    """Without it nobody would know that the random graphs can tell a wrong pass from a right one."""
    name, apply = BROKEN[what]
    tried = map(recipe, range(400))
    found = next((item for item in tried if broken_alone(item, name, apply) is not None), None)
    assert found is not None
    assert broken_alone(found, name, apply_pass) is None, "the pass itself is right"
    small = shrink(found, lambda smaller: broken_alone(smaller, name, apply) is not None)
    assert len(small.fragments) <= 1
