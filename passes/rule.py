"""Rules: declared once, and their own documentation and test.

A rule is a class with ``before`` and ``after`` (see ``pattern``), an optional ``when(m)`` that raises ``Reject`` with a
reason, a docstring, and ``examples``: pairs of a graph text and what becomes of it, which is another graph text,
``"rejected: why"`` or ``"unchanged"``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import aten
from ..ir.verify import excerpt
from .ledger import PassReport, Refusal
from .matcher import Match, Trail, matches
from .pattern import Call, Pattern, Var, read_pattern

Example = tuple[str, str]


class Reject(Exception):
    """Raised by ``when``: the pattern fits, but the rule does not apply; says why."""


@dataclass(frozen=True)
class Rule:
    """A declared rule. ``exact`` rules give the same numbers in fp32 up to reassociation."""

    name: str
    doc: str
    before: Pattern
    after: Pattern
    when: Callable[[Match], None] | None
    examples: tuple[Example, ...]
    exact: bool = True
    shared_inner: bool = field(default=False)
    asks_first: ClassVar[bool] = True

    def __call__(self, graph: Graph, report: PassReport) -> Graph:
        """Apply the rule, in place, wherever it fits, and note all sites."""
        for root in list(graph.calls()):
            if not root._erased:
                self._site(graph, root, report)
        return graph

    def _site(self, graph: Graph, root: Node, report: PassReport) -> None:
        first = self.before.results[0]
        if isinstance(first, Call) and root.target != first.target:
            return
        refusal: tuple[str, Node] | None = None
        trail = Trail()
        for found in matches(self.before, root, trail):
            why = self._refusal(found)
            if why is None:
                if report.allows(root.name):
                    name = root.name
                    _replace(graph, self, found)
                    report.fused.append(name)
                return
            refusal = refusal or why
        if refusal:
            report.refuse(root.name, *refusal)
        elif trail.depth >= max(2, (self.before.size + 1) // 2):
            report.near.append(Refusal(root.name, trail.why, excerpt(trail.node) if trail.node else ""))

    def _refusal(self, found: Match) -> tuple[str, Node] | None:
        """Why the rule does not apply where its pattern fits, and the node that stands in the way."""
        if self.when is not None:
            try:
                self.when(found)
            except Reject as reason:
                return str(reason), found.roots[0]
        if not self.shared_inner:
            own = {*found.calls.values(), *found.casts}
            for node in found.inner:
                for user in node.users:
                    if user not in own:
                        return f"{node.name} is also used by {user.name}", user if user.op == "call_function" else node
        return None


def rule(declaration: type | None = None, *, exact: bool = True, shared_inner: bool = False) -> Any:
    """Class decorator that makes a ``Rule`` of a declaration.

    ``exact=False`` marks a rule that changes the numbers; ``shared_inner=True`` lets it apply although values inside
    the pattern have other users (they are then computed twice).

    Raises:
        ValueError: the declaration lacks a docstring, examples, ``before`` or ``after``.
    """

    def make(cls: type) -> Rule:
        doc = inspect.getdoc(cls) or ""
        examples = tuple(getattr(cls, "examples", ()))
        if not doc or not examples:
            raise ValueError(f"rule {cls.__name__} needs a docstring and examples")
        members = vars(cls)
        if "before" not in members or "after" not in members:
            raise ValueError(f"rule {cls.__name__} needs before and after")
        before, after = read_pattern(members["before"]), read_pattern(members["after"])
        when = members.get("when")
        return Rule(cls.__name__, doc, before, after, when, examples, exact, shared_inner)

    return make if declaration is None else make(declaration)


def _replace(graph: Graph, rule: Rule, found: Match) -> None:
    # New values stand before the first of the replaced ones. Weights that are defined later move up: they read nothing.
    first = min(found.roots)
    operands = [item for item in found.bound.values() if isinstance(item, Node)]
    for operand in operands:
        hoist(operand, first)
    place = max([first.prev, *operands]).next
    builder = _Builder(graph, found, place)
    results = [builder.build(result) for result in rule.after.results]
    for root, result in zip(found.roots, results):
        stated = type_of(root)
        if type_of(result).shape != stated.shape:
            raise AssertionError(f"{rule.name} changes the shape of {root.name}: {stated} to {type_of(result)}")
        if type_of(result).dtype != stated.dtype:
            result = builder.add(aten("to.dtype"), (result, stated.torch_dtype), {})
        root.replace_all_uses_with(result)
        if result in builder.made:
            line = root.meta.get("source", "").rpartition("; ")[2]
            result.meta["source"] = f"{rule.name}; {line}" if ":" in line else rule.name
            result.name, name = root.name, result.name
            root.name = name
        graph.erase_node(root)


def hoist(node: Node, before: Node) -> None:
    """Move a weight, or a value made of weights alone, up to ``before`` if it is defined later."""
    if before < node and is_constant(node):
        for source in node.all_input_nodes:
            hoist(source, before)
        before.prepend(node)


class _Builder:
    """Builds the right-hand side of a rule, one node after another."""

    def __init__(self, graph: Graph, found: Match, place: Node) -> None:
        self.graph = graph
        self.found = found
        self.place = place
        self.made: list[Node] = []
        self.known: dict[Call, Node] = {}

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = insert_before(self.graph, self.place, target, args, kwargs)
        self.made.append(node)
        return node

    def build(self, value: Any) -> Any:
        if isinstance(value, Var):
            return self.found.bound[value.name]
        if isinstance(value, list):
            return [self.build(item) for item in value]
        if not isinstance(value, Call):
            return value
        if value not in self.known:
            args = tuple(self.build(item) for item in value.args)
            kwargs = {name: self.build(item) for name, item in value.kwargs.items()}
            target = operator.getitem if value.target == "getitem" else value.target
            self.known[value] = self.add(target, args, kwargs)
        return self.known[value]
