"""Text to graph. The text is read with ``ast`` and never executed."""

from __future__ import annotations

import ast
import math
import operator
import re
from functools import lru_cache
from typing import Any

from torch.fx import Node

from .errors import VerificationError
from .graph import Graph, Region
from .ops import resolve
from .schemes import scheme_of
from .types import DTYPES, Dim, Size, TensorType, Type, parse_placement, parse_size


class ParseError(VerificationError):
    """The text is no graph: says which line and why."""


def parse(text: str) -> Graph:
    """Rebuild the graph that ``dump`` wrote.

    Raises:
        ParseError: the text is not Python syntax, uses an unknown operator or name, or lacks a type.
    """
    return _Parser(text).graph


# A line up to the first # that stands outside of strings, and what follows it.
_COMMENT = re.compile(r"""(?:[^"'#]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')*# ?(.*)""")


def _comments(lines: list[str]) -> dict[int, str]:
    found = ((number, _COMMENT.fullmatch(line)) for number, line in enumerate(lines, 1) if "#" in line)
    return {number: match[1] for number, match in found if match}


def _size(tree: ast.expr) -> Size:
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return Dim.named(name)
    return parse_size(ast.unparse(tree))


def _dotted(tree: ast.expr) -> str:
    """The text of ``a.b.c``."""
    match tree:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=owner, attr=name):
            return f"{_dotted(owner)}.{name}"
    return ast.unparse(tree)


@lru_cache(maxsize=4)
def _syntax(text: str) -> ast.Module:
    """The syntax of a text; a graph that is checked and then read again is often the same."""
    return ast.parse(text)


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.text = text
        self.values: dict[str, Node] = {}
        try:
            tree = _syntax(text)
        except SyntaxError as error:
            raise ParseError(f"line {error.lineno or 1}: not Python syntax: {error}") from error
        self.comments = _comments(self.lines)
        if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
            raise ParseError("line 1: a graph is exactly one function definition")
        function = tree.body[0]
        self.graph = Graph(function.name)
        self._signature(function)
        self._body(function)

    def _fail(self, node: ast.AST, why: str) -> ParseError:
        number = getattr(node, "lineno", 1)
        return ParseError(f"line {number}: {why}\n    {self.lines[number - 1].strip()}")

    def _signature(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.defaults or arguments.posonlyargs:
            raise self._fail(function, "inputs are plain names with types")
        for item in arguments.kwonlyargs:
            match item.annotation:
                case ast.Call(
                    func=ast.Name(id="dim"), args=[ast.Constant(value=int(low)), ast.Constant(value=int(high))]
                ):
                    self.graph.dims[item.arg] = (low, high)
                case ast.Call(func=ast.Name(id="option"), args=[ast.Constant(value=(int() | str()) as value)]):
                    self.graph.options[item.arg] = value
                case _:
                    raise self._fail(item, f"dim {item.arg} needs a range: {item.arg}: dim(1, 8192)")
        for item in arguments.args:
            if item.annotation is None:
                raise self._fail(item, f"input {item.arg} has no type")
            node = self.graph.placeholder(item.arg)
            self._define(item, node, item.arg, self._type(item.annotation))

    def _define(self, at: ast.AST, node: Node, name: str, type: Type) -> None:
        if name in self.values or name in self.graph.dims or name in DTYPES or scheme_of(name):
            raise self._fail(at, f"the name {name} is taken")
        if node.name != name:
            node.name = name
        node.meta["type"] = type
        source = self.comments.get(getattr(at, "lineno", 0))
        if source and node.op == "call_function":
            node.meta["source"] = source
        self.values[name] = node

    def _type(self, tree: ast.expr) -> Type:
        if isinstance(tree, ast.Tuple):
            parts = [self._type(item) for item in tree.elts]
            return tuple(part for part in parts if isinstance(part, TensorType))
        placement = ""
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult):
            placement = ast.unparse(tree.right)
            tree = tree.left
        if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name):
            raise self._fail(tree, f"not a type: {ast.unparse(tree)}")
        sizes = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
        if tree.value.id not in DTYPES and scheme_of(tree.value.id) is None:
            raise self._fail(tree, f"unknown element type {tree.value.id}")
        try:
            shape = tuple(map(_size, sizes))
            placement = parse_placement(placement, len(shape)) if placement else ""
        except ValueError as error:
            raise self._fail(tree, str(error)) from error
        return TensorType(tree.value.id, shape, placement)

    def _body(self, function: ast.FunctionDef) -> None:
        regions = 0
        for statement in function.body:
            match statement:
                case ast.With(
                    items=[
                        ast.withitem(
                            context_expr=ast.Call(func=ast.Name(id="kernel"), args=[ast.Constant(value=str(name))])
                        )
                    ]
                ):
                    region = Region(name, regions)
                    regions += 1
                    for inner in statement.body:
                        self._assignment(inner).meta["region"] = region
                case ast.AnnAssign():
                    self._assignment(statement)
                case ast.Return(value=ast.expr() as result):
                    self.graph.output(self._value(result))
                    return
                case _:
                    raise self._fail(statement, "expected `name: type = op(...)`, `with kernel(...)` or `return`")
        raise self._fail(function, "the graph returns nothing")

    def _assignment(self, statement: ast.stmt) -> Node:
        if not (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value is not None
        ):
            raise self._fail(statement, "expected `name: type = op(...)`")
        call, name = statement.value, statement.target.id
        if isinstance(call, ast.Subscript):
            target, arguments, named = operator.getitem, (self._value(call.value), self._value(call.slice)), {}
        elif isinstance(call, ast.Call):
            op = _dotted(call.func)
            try:
                target = resolve(op.removesuffix(".default"))
            except KeyError:
                raise self._fail(call, f"unknown operator {op}") from None
            arguments = tuple(self._value(item) for item in call.args)
            named = {item.arg: self._value(item.value) for item in call.keywords if item.arg}
        else:
            raise self._fail(statement, "the right-hand side is no call")
        node = self.graph.create_node("call_function", target, arguments, named, name=name)
        self._define(statement, node, name, self._type(statement.annotation))
        return node

    def _value(self, tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float()) as number)):
                return -number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
                return -math.inf
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.Name(id=name) if name in DTYPES:
                return DTYPES[name]
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.Name() | ast.BinOp():
                try:
                    size = parse_size(ast.unparse(tree))
                except ValueError as error:
                    raise self._fail(tree, str(error)) from error
                if isinstance(size, Dim):
                    for name, _ in size.terms:
                        if name not in self.graph.dims:
                            raise self._fail(tree, f"unknown name {name}")
                return size
        raise self._fail(tree, f"cannot read {ast.unparse(tree)}")
