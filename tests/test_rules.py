"""Every rule is tested by its own examples: as text, and as numbers."""

from __future__ import annotations

import pytest
import torch

from fuseline import ir
from fuseline.ir.interpret import interpret, random_inputs
from fuseline.passes import RULES, Rule, rule

EXAMPLES = [pytest.param(item, *pair, id=f"{item.name}-{i}") for item in RULES for i, pair in enumerate(item.examples)]


@pytest.mark.parametrize(("item", "before", "outcome"), EXAMPLES)
def test_example_as_text(item: Rule, before: str, outcome: str) -> None:
    graph = ir.parse(before)
    ir.verify(graph)
    after, report = item(graph)
    ir.verify(after)
    assert str(graph) == before, "a rule leaves its input as it was"
    if outcome == "unchanged":
        assert str(after) == before
        assert report.found == 0
    elif outcome.startswith("rejected: "):
        assert str(after) == before
        assert [refusal.why for refusal in report.refused] == [outcome.removeprefix("rejected: ")]
    else:
        assert str(after) == outcome
        assert len(report.fused) == 1


@pytest.mark.parametrize(("item", "before", "outcome"), EXAMPLES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_example_as_numbers(item: Rule, before: str, outcome: str, tokens: int) -> None:
    graph = ir.parse(before)
    after, _ = item(graph)
    inputs, weights = random_inputs(graph, {"T": tokens}, seed=tokens)
    expected = interpret(graph, inputs, weights)
    found = interpret(after, inputs, weights)
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("item", RULES, ids=lambda item: item.name)
def test_rule_is_complete(item: Rule) -> None:
    outcomes = [outcome for _, outcome in item.examples]
    assert item.doc
    assert any(not text.startswith("rejected") and text != "unchanged" for text in outcomes), "an example that fuses"
    assert any(text.startswith("rejected") or text == "unchanged" for text in outcomes), "an example that does not"


def test_rule_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a docstring and examples"):

        @rule
        class Nothing:
            """Has no examples."""
