"""Every rule is tested by its own examples: as text, and as numbers."""

from __future__ import annotations

import pytest

from fuseline.passes import RULES, Rule, rule
from fuseline.passes.testing import check_numbers, check_rule, check_text

EXAMPLES = [pytest.param(item, *pair, id=f"{item.name}-{i}") for item in RULES for i, pair in enumerate(item.examples)]


@pytest.mark.parametrize(("item", "before", "outcome"), EXAMPLES)
def test_example_as_text(item: Rule, before: str, outcome: str) -> None:
    check_text(item, before, outcome)


@pytest.mark.parametrize(("item", "before", "outcome"), EXAMPLES)
def test_example_as_numbers(item: Rule, before: str, outcome: str) -> None:
    check_numbers(item, before)


@pytest.mark.parametrize("item", RULES, ids=lambda item: item.name)
def test_rule_is_complete(item: Rule) -> None:
    check_rule(item)


def test_rule_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a docstring and examples"):

        @rule
        class Nothing:
            """Has no examples."""
