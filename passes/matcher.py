"""Find the places where a pattern fits: commuted operands and casts between its operators are seen through."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.ops import COMMUTATIVE, Op, op_name
from .pattern import Call, Pattern, Var

_FLOAT_WIDTH = {"f16": 1, "bf16": 1, "f32": 2, "f64": 3}


@dataclass
class Match:
    """A place where the pattern fits: ``m["gate"]`` is what a variable stands for, ``roots`` are to be replaced."""

    bound: dict[str, Any] = field(default_factory=dict)
    calls: dict[Call, Node] = field(default_factory=dict)
    casts: tuple[Node, ...] = ()
    roots: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    @property
    def inner(self) -> list[Node]:
        """The matched nodes that are not replaced themselves."""
        return [node for node in self.calls.values() if node not in self.roots]


@dataclass
class Trail:
    """How far the best attempt to match came that failed: operators matched, and the first thing that did not fit."""

    depth: int = 0
    why: str = ""
    node: Node | None = None

    def note(self, so_far: Match, at: Node, why: str) -> None:
        if len(so_far.calls) > self.depth:
            self.depth, self.why, self.node = len(so_far.calls), why, at


def matches(pattern: Pattern, root: Node, trail: Trail | None = None) -> Iterator[Match]:
    """Every way in which the first result of the pattern is ``root``; further results are found among its relatives.

    ``trail`` is told of the attempts that fail.
    """
    search = _Search(trail or Trail())
    for found in search.match(pattern.results[0], root, Match(), root):
        yield from search.further(pattern.results[1:], root, found, (found.calls.get(pattern.results[0], root),))


def is_rounding(node: Any) -> bool:
    """Whether a value is a cast to a float type; one to integers cuts off the fraction."""
    if not isinstance(node, Node) or node.op != "call_function" or op_name(node.target) != "aten.to.dtype":
        return False
    return isinstance(node.args[0], Node) and type_of(node).dtype in _FLOAT_WIDTH


def through_casts(node: Any) -> Any:
    """The value before casts."""
    while is_rounding(node):
        node = node.args[0]
    return node


def before_widening(node: Any) -> Any:
    """The value before casts to a wider float type: operators of ours compute in fp32 anyway."""
    while is_rounding(node):
        source = node.args[0]
        narrow, wide = type_of(source).dtype, type_of(node).dtype
        if _FLOAT_WIDTH.get(narrow, 9) >= _FLOAT_WIDTH.get(wide, 0):
            break
        node = source
    return node


class _Search:
    def __init__(self, trail: Trail) -> None:
        self.trail = trail

    def further(self, rest: tuple[Any, ...], root: Node, found: Match, roots: tuple[Node, ...]) -> Iterator[Match]:
        if not rest:
            yield Match(found.bound, found.calls, found.casts, roots)
            return
        if rest[0] in found.calls:
            yield from self.further(rest[1:], root, found, (*roots, found.calls[rest[0]]))
            return
        shared = [item for item in found.bound.values() if isinstance(item, Node)] + list(found.calls.values())
        seen: set[Node] = set()
        for value in shared:
            for user in list(value.users):
                if user not in seen and user not in roots:
                    seen.add(user)
                    for deeper in self.match(rest[0], user, found, user):
                        yield from self.further(rest[1:], root, deeper, (*roots, user))

    def match(self, pattern: Any, value: Any, so_far: Match, owner: Node) -> Iterator[Match]:
        """Ways to match an argument ``value`` of ``owner``."""
        if isinstance(pattern, Var):
            yield from self.bind(pattern, value, so_far, owner)
        elif isinstance(pattern, Call):
            yield from self.match_call(pattern, value, so_far, owner)
        elif isinstance(pattern, list):
            if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                yield from self.match_all(list(zip(pattern, value)), so_far, owner)
        elif not isinstance(value, Node) and _same_literal(pattern, value):
            yield so_far
        else:
            shown = value.name if isinstance(value, Node) else value
            self.trail.note(so_far, owner, f"{owner.name} has {shown} where {pattern} is expected")

    def bind(self, variable: Var, value: Any, so_far: Match, owner: Node) -> Iterator[Match]:
        if not _fits(variable, value):
            kind = variable.literal.__name__ if variable.literal else "value"
            self.trail.note(so_far, owner, f"{owner.name} has {value} where a {kind} is expected")
            return
        value = before_widening(value)
        if variable.name not in so_far.bound:
            yield Match({**so_far.bound, variable.name: value}, so_far.calls, so_far.casts)
            return
        known = so_far.bound[variable.name]
        if known is value or (not isinstance(value, Node) and known == value):
            yield so_far
            return
        left, right = (item.name if isinstance(item, Node) else item for item in (value, known))
        self.trail.note(so_far, owner, f"{owner.name} reads {left}, not {right}")

    def match_call(self, pattern: Call, value: Any, so_far: Match, owner: Node) -> Iterator[Match]:
        if pattern in so_far.calls:
            if through_casts(so_far.calls[pattern]) is through_casts(value):
                yield so_far
            return
        casts: list[Node] = []
        if isinstance(value, Node) and (pattern.target == "getitem" or op_name(pattern.target) != "aten.to.dtype"):
            while is_rounding(value):
                casts.append(value)
                value = value.args[0]
        wanted = operator.getitem if pattern.target == "getitem" else pattern.target
        if not isinstance(value, Node) or value.op != "call_function" or value.target != wanted:
            found = value if not isinstance(value, Node) else f"{value.name} ({op_name(value.target)})"
            self.trail.note(so_far, owner, f"{owner.name} reads {found} where {op_name(wanted)} is expected")
            return
        theirs, ours = _with_defaults(value.target, value.args), _with_defaults(value.target, pattern.args)
        if len(theirs) != len(ours) or set(value.kwargs) != set(pattern.kwargs):
            self.trail.note(so_far, value, f"{value.name} ({op_name(wanted)}) has other arguments")
            return
        entered = Match(so_far.bound, {**so_far.calls, pattern: value}, (*so_far.casts, *casts))
        named = [(pattern.kwargs[name], value.kwargs[name]) for name in pattern.kwargs]
        orders = [list(zip(ours, theirs))]
        if pattern.target != "getitem" and op_name(pattern.target) in COMMUTATIVE:
            orders.append([(ours[0], theirs[1]), (ours[1], theirs[0])])
        for order in orders:
            yield from self.match_all(order + named, entered, value)

    def match_all(self, pairs: list[tuple[Any, Any]], so_far: Match, owner: Node) -> Iterator[Match]:
        if not pairs:
            yield so_far
            return
        for found in self.match(*pairs[0], so_far, owner):
            yield from self.match_all(pairs[1:], found, owner)


def _same_literal(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return pattern == value or abs(pattern - value) <= 1e-6 * abs(pattern)
    return bool(pattern == value)


def _fits(variable: Var, value: Any) -> bool:
    """Whether a variable may stand for a value, by its annotation."""
    if variable.literal is None:
        return isinstance(value, Node)
    if variable.literal is object:
        return value is None or isinstance(value, Node)
    accepted = (int, float) if variable.literal is float else variable.literal
    return isinstance(value, accepted) and not isinstance(value, bool)


def _with_defaults(target: Any, args: Sequence[Any]) -> list[Any]:
    """The positional arguments with the defaults that the text leaves out."""
    full = list(args)
    if isinstance(target, Op):
        full += [item.default for item in target.parameters[len(full) :] if item.default is not item.empty]
    elif target is not operator.getitem:
        positional = [item for item in target._schema.arguments if not item.kwarg_only]
        full += [item.default_value for item in positional[len(full) :] if item.has_default_value()]
    return full
