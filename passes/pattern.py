"""Patterns: the ``before`` and ``after`` of a rule, read from their source and never executed.

A pattern is one function whose body may name intermediate values and ends in ``return``. Parameters stand for any
value of the graph; a parameter annotated ``int``, ``float``, ``str`` or ``list`` stands for a literal argument of that
type, and one annotated ``object`` for a value or ``None``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.ops import resolve
from ..ir.types import DTYPES


@dataclass(frozen=True)
class Var:
    """Any value, or any literal of type ``literal``."""

    name: str
    literal: type | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A call of an operator; the same ``Call`` object used twice must match the same node."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """``results`` are the values that a match replaces, in order; ``variables`` are the parameters."""

    variables: tuple[Var, ...]
    results: tuple[Any, ...]

    @property
    def size(self) -> int:
        """How many operators the pattern holds."""
        return len({call for result in self.results for call in _calls(result)})


def _calls(value: Any) -> Iterator[Call]:
    if isinstance(value, Call):
        yield value
        for item in value.args:
            yield from _calls(item)
    elif isinstance(value, list):
        for item in value:
            yield from _calls(item)


_LITERALS: dict[str, type] = {"int": int, "float": float, "str": str, "list": list, "object": object}


def read_pattern(function: Callable[..., Any]) -> Pattern:
    """Read a pattern function.

    Raises:
        ValueError: the source is not of the form a pattern may have.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise ValueError(f"{function.__qualname__} is no plain function")
    names: dict[str, Any] = {}
    variables = []
    for argument in tree.args.args:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        variable = Var(argument.arg, _LITERALS.get(annotation.strip("'\"")))
        variables.append(variable)
        names[argument.arg] = variable
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = _value(value, names)
            case ast.Return(value=ast.Tuple(elts=items)):
                return Pattern(tuple(variables), tuple(_value(item, names) for item in items))
            case ast.Return(value=ast.expr() as value):
                return Pattern(tuple(variables), (_value(value, names),))
            case ast.Expr(value=ast.Constant()):
                continue
            case _:
                raise ValueError(f"{function.__qualname__}: a pattern holds assignments and a return")
    raise ValueError(f"{function.__qualname__} returns nothing")


def _value(tree: ast.expr, names: Mapping[str, Any]) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name) if name in DTYPES:
            return DTYPES[name]
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.Subscript(value=value, slice=ast.Constant(value=int(index))):
            return Call("getitem", (_value(value, names), index))
        case ast.Call(func=function, args=args, keywords=keywords):
            target = resolve(ast.unparse(function).removesuffix(".default"))
            named = {item.arg: _value(item.value, names) for item in keywords if item.arg}
            return Call(target, tuple(_value(item, names) for item in args), named)
    raise ValueError(f"a pattern cannot hold {ast.unparse(tree)}")
