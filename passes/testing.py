"""For those who write rules: run a rule's examples, as text and as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir.dump import dump
from ..ir.interpret import interpret, random_inputs
from ..ir.parse import parse
from ..ir.verify import verify
from .ledger import PassReport
from .rule import Rule

_SIZES = (1, 7)  # of the dynamic dims


def check_rule(rule: Rule) -> None:
    """Run every example of a rule.

    Raises:
        AssertionError: an example becomes another text than it says, or other numbers than before; or there is none
            that fuses, or none that does not.
    """
    outcomes = [outcome for _, outcome in rule.examples]
    fusing = [text for text in outcomes if not _is_refusal(text)]
    assert fusing, f"{rule.name} has no example that fuses"
    assert len(fusing) < len(outcomes), f"{rule.name} has no example that does not fuse"
    for before, outcome in rule.examples:
        check_text(rule, before, outcome)
        check_numbers(rule, before)


def check_text(rule: Rule, before: str, outcome: str) -> None:
    """Run one example as text: it becomes ``outcome``, or is left alone for the reason that ``outcome`` gives."""
    graph = parse(before)
    verify(graph)
    report = PassReport(rule.name)
    after = rule(graph.copy(), report)
    after.eliminate_dead()
    verify(after)
    assert dump(graph) == before, f"{rule.name}: the text of an example is not as dumps write it:\n{dump(graph)}"
    text = dump(after)
    wanted = before if _is_refusal(outcome) else outcome
    assert text == wanted, f"{rule.name} makes\n{text}\nwhere its example says\n{wanted}"
    if outcome == "unchanged":
        assert not report.found, f"{rule.name}: the pattern fits an example that is to stay unchanged"
    elif _is_refusal(outcome):
        reasons: Sequence[str] = [item.why for item in report.refused]
        assert reasons == [outcome.removeprefix("rejected: ")], (
            f"{rule.name} gives the reasons {reasons}, not {outcome!r}"
        )
    else:
        assert report.fused, f"{rule.name} does not say that it fused"


def check_numbers(rule: Rule, before: str) -> None:
    """Run one example as numbers: the graph computes the same before and after, in fp32 up to reassociation."""
    if not rule.exact:
        return
    graph = parse(before)
    after = rule(graph.copy(), PassReport(rule.name))
    for size in _SIZES:
        inputs, weights = random_inputs(graph, dict.fromkeys(graph.dims, size), seed=size)
        results = zip(interpret(graph, inputs, weights), interpret(after, inputs, weights), strict=True)
        for left, right in results:
            torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6, equal_nan=True)


def _is_refusal(outcome: str) -> bool:
    return outcome == "unchanged" or outcome.startswith("rejected: ")
