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


def matches(pattern: Pattern, root: Node) -> Iterator[Match]:
    """Every way in which the first result of the pattern is ``root``; further results are found among its relatives."""
    for found in _match(pattern.results[0], root, Match()):
        yield from _further(pattern.results[1:], root, found, (found.calls.get(pattern.results[0], root),))


def _further(rest: tuple[Any, ...], root: Node, found: Match, roots: tuple[Node, ...]) -> Iterator[Match]:
    if not rest:
        yield Match(found.bound, found.calls, found.casts, roots)
        return
    if rest[0] in found.calls:
        yield from _further(rest[1:], root, found, (*roots, found.calls[rest[0]]))
        return
    shared = [item for item in found.bound.values() if isinstance(item, Node)] + list(found.calls.values())
    seen: set[Node] = set()
    for value in shared:
        for user in list(value.users):
            if user not in seen and user not in roots:
                seen.add(user)
                for deeper in _match(rest[0], user, found):
                    yield from _further(rest[1:], root, deeper, (*roots, user))


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
    while isinstance(node, Node) and node.op == "call_function" and op_name(node.target) == "aten.to.dtype":
        source = node.args[0]
        if not isinstance(source, Node):
            break
        narrow, wide = type_of(source).dtype, type_of(node).dtype
        if _FLOAT_WIDTH.get(narrow, 9) >= _FLOAT_WIDTH.get(wide, 0):
            break
        node = source
    return node


def _match(pattern: Any, value: Any, so_far: Match) -> Iterator[Match]:
    if isinstance(pattern, Var):
        yield from _bind(pattern, value, so_far)
    elif isinstance(pattern, Call):
        yield from _match_call(pattern, value, so_far)
    elif isinstance(pattern, list):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _match_all(list(zip(pattern, value)), so_far)
    elif isinstance(value, Node):
        return
    elif type(pattern) is type(value) or (isinstance(pattern, (int, float)) and isinstance(value, (int, float))):
        close = (
            isinstance(pattern, float)
            and isinstance(value, (int, float))
            and abs(pattern - value) <= 1e-6 * abs(pattern)
        )
        if close or pattern == value:
            yield so_far
    elif pattern == value:
        yield so_far


def _bind(variable: Var, value: Any, so_far: Match) -> Iterator[Match]:
    if variable.literal is object:
        if value is not None and not isinstance(value, Node):
            return
    elif variable.literal is not None:
        accepted = (int, float) if variable.literal is float else variable.literal
        if isinstance(value, Node) or not isinstance(value, accepted) or isinstance(value, bool):
            return
    elif not isinstance(value, Node):
        return
    value = before_widening(value)
    if variable.name in so_far.bound:
        if so_far.bound[variable.name] is value or (
            not isinstance(value, Node) and so_far.bound[variable.name] == value
        ):
            yield so_far
        return
    yield Match({**so_far.bound, variable.name: value}, so_far.calls, so_far.casts)


def _match_call(pattern: Call, value: Any, so_far: Match) -> Iterator[Match]:
    if not isinstance(value, Node):
        return
    if pattern in so_far.calls:
        if through_casts(so_far.calls[pattern]) is through_casts(value):
            yield so_far
        return
    casts: list[Node] = []
    if not (pattern.target != "getitem" and op_name(pattern.target) == "aten.to.dtype"):
        node: Any = value
        while is_rounding(node):
            casts.append(node)
            node = node.args[0]
        value = node
    if value.op != "call_function":
        return
    if pattern.target == "getitem":
        if value.target is not operator.getitem:
            return
    elif value.target != pattern.target:
        return
    theirs, ours = _with_defaults(value.target, value.args), _with_defaults(value.target, pattern.args)
    if len(theirs) != len(ours) or set(value.kwargs) != set(pattern.kwargs):
        return
    entered = Match(so_far.bound, {**so_far.calls, pattern: value}, (*so_far.casts, *casts))
    named = [(pattern.kwargs[name], value.kwargs[name]) for name in pattern.kwargs]
    orders = [list(zip(ours, theirs))]
    if pattern.target != "getitem" and op_name(pattern.target) in COMMUTATIVE:
        orders.append([(ours[0], theirs[1]), (ours[1], theirs[0])])
    for order in orders:
        yield from _match_all(order + named, entered)


def _match_all(pairs: list[tuple[Any, Any]], so_far: Match) -> Iterator[Match]:
    if not pairs:
        yield so_far
        return
    for found in _match(*pairs[0], so_far):
        yield from _match_all(pairs[1:], found)


def _with_defaults(target: Any, args: Sequence[Any]) -> list[Any]:
    """The positional arguments with the defaults that the text leaves out."""
    full = list(args)
    if isinstance(target, Op):
        full += [item.default for item in target.parameters[len(full) :] if item.default is not item.empty]
    elif target is not operator.getitem:
        positional = [item for item in target._schema.arguments if not item.kwarg_only]
        full += [item.default_value for item in positional[len(full) :] if item.has_default_value()]
    return full
