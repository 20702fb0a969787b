"""Text to graph. The text is read with ``ast`` and never executed.

A line is read once: graphs that come of one another, and equal layers, have most of their lines in common.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
    lines = text.splitlines()
    try:
        return _Builder(lines).graph(_as_dumped(lines))
    except SyntaxError:  # a statement may have several lines, and other lines may be empty
        pass
    try:
        return _Builder(lines).graph(_as_python(text))
    except SyntaxError as error:
        raise ParseError(f"line {error.lineno or 1}: not Python syntax: {error}") from error


# A line of the text: its number, whether it stands in a kernel, and the statement without what is in it.
_Line = tuple[int, bool, str]
# How ``dump`` indents: once, and twice in a kernel.
_INDENTED = re.compile(r"(    |        )(?=[^\s#])(.*)")


def _as_dumped(lines: list[str]) -> Iterator[_Line]:
    """The lines of a text in which each is a statement, as ``dump`` writes them. Raises ``SyntaxError`` where one is not."""
    if not lines or not lines[0].startswith("def "):
        raise SyntaxError("not a function")
    yield 1, False, lines[0]
    opens = kernel = False
    for number, line in enumerate(lines[1:], 2):
        match = _INDENTED.fullmatch(line)
        inside = match is not None and len(match[1]) > 4
        if match is None or (not inside if opens else inside and not kernel):
            raise SyntaxError(f"line {number} is indented in another way")
        if match[2].startswith("def ") or (match[2].startswith("return") and number < len(lines)):
            raise SyntaxError(f"line {number} is not the last of one function")
        opens = match[2].startswith("with ")
        kernel = inside or opens
        yield number, inside, match[2]


def _as_python(text: str) -> Iterator[_Line]:
    """The lines of any text. Raises ``SyntaxError``, and ``ParseError`` if it is no function."""
    tree = ast.parse(text)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise ParseError("line 1: a graph is exactly one function definition")
    function = tree.body[0]
    yield function.lineno, False, f"def {function.name}({ast.unparse(function.args)}):"
    for statement in function.body:
        if isinstance(statement, ast.With):
            yield statement.lineno, False, f"with {', '.join(map(ast.unparse, statement.items))}:"
            yield from ((inner.lineno, True, ast.unparse(inner)) for inner in statement.body)
        else:
            yield statement.lineno, False, ast.unparse(statement)


@dataclass(frozen=True)
class _Word:
    """A name among arguments: what it stands for depends on the graph."""

    text: str


@dataclass(frozen=True)
class _Kernel:
    """``with kernel(name):``"""

    name: str


@dataclass(frozen=True)
class _Assignment:
    """``name: type = target(*args, **named)``"""

    name: str
    type: Type
    target: Any
    args: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class _Result:
    """``return value``"""

    value: Any


@dataclass(frozen=True)
class _Signature:
    """``def name(inputs, *, dims, options):``"""

    name: str
    inputs: tuple[tuple[str, Type], ...]
    dims: tuple[tuple[str, tuple[int, int]], ...]
    options: tuple[tuple[str, int | str], ...]


# Many times the lines of one model and its passes.
@lru_cache(maxsize=20_000)
def _read(line: str) -> _Signature | _Kernel | _Assignment | _Result:
    """What a line says. Raises ``SyntaxError`` if it is no statement, and ``ValueError`` if it is one that no graph holds."""
    statement, *others = ast.parse(line + " pass" if line.startswith(("def ", "with ")) else line).body
    if others:
        raise SyntaxError("more than one statement")
    match statement:
        case ast.FunctionDef():
            return _signature(statement)
        case ast.With(
            items=[
                ast.withitem(context_expr=ast.Call(func=ast.Name(id="kernel"), args=[ast.Constant(value=str(name))]))
            ]
        ):
            return _Kernel(name)
        case ast.AnnAssign(target=ast.Name(), value=ast.expr()):
            return _assignment(statement)
        case ast.Return(value=ast.expr() as result):
            return _Result(_value(result))
        case ast.AnnAssign() | ast.Assign():
            raise ValueError("expected `name: type = op(...)`")
    raise ValueError("expected `name: type = op(...)`, `with kernel(...)` or `return`")


def _signature(function: ast.FunctionDef) -> _Signature:
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.defaults or arguments.posonlyargs:
        raise ValueError("inputs are plain names with types")
    inputs: list[tuple[str, Type]] = []
    dims: list[tuple[str, tuple[int, int]]] = []
    options: list[tuple[str, int | str]] = []
    for item in arguments.kwonlyargs:
        match item.annotation:
            case ast.Call(func=ast.Name(id="dim"), args=[ast.Constant(value=int(low)), ast.Constant(value=int(high))]):
                dims.append((item.arg, (low, high)))
            case ast.Call(func=ast.Name(id="option"), args=[ast.Constant(value=(int() | str()) as value)]):
                options.append((item.arg, value))
            case _:
                raise ValueError(f"dim {item.arg} needs a range: {item.arg}: dim(1, 8192)")
    for item in arguments.args:
        if item.annotation is None:
            raise ValueError(f"input {item.arg} has no type")
        inputs.append((item.arg, _type(item.annotation)))
    return _Signature(function.name, tuple(inputs), tuple(dims), tuple(options))


def _assignment(statement: ast.AnnAssign) -> _Assignment:
    assert isinstance(statement.target, ast.Name)
    name, kind, call = statement.target.id, _type(statement.annotation), statement.value
    if isinstance(call, ast.Subscript):
        return _Assignment(name, kind, operator.getitem, (_value(call.value), _value(call.slice)))
    if not isinstance(call, ast.Call):
        raise ValueError("the right-hand side is no call")
    op = ast.unparse(call.func)
    try:
        target = resolve(op.removesuffix(".default"))
    except KeyError:
        raise ValueError(f"unknown operator {op}") from None
    named = tuple((item.arg, _value(item.value)) for item in call.keywords if item.arg)
    return _Assignment(name, kind, target, tuple(map(_value, call.args)), named)


def _type(tree: ast.expr) -> Type:
    if isinstance(tree, ast.Tuple):
        parts = [_type(item) for item in tree.elts]
        return tuple(part for part in parts if isinstance(part, TensorType))
    placement = ""
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult):
        placement = ast.unparse(tree.right)
        tree = tree.left
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name):
        raise ValueError(f"not a type: {ast.unparse(tree)}")
    sizes = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    if tree.value.id not in DTYPES and scheme_of(tree.value.id) is None:
        raise ValueError(f"unknown element type {tree.value.id}")
    shape = tuple(map(_size, sizes))
    return TensorType(tree.value.id, shape, parse_placement(placement, len(shape)) if placement else "")


def _size(tree: ast.expr) -> Size:
    return parse_size(ast.unparse(tree))


def _value(tree: ast.expr) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float()) as number)):
            return -number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return -math.inf
        case ast.Name(id=name):
            return _Word(name)
        case ast.BinOp():
            return _size(tree)
    raise ValueError(f"cannot read {ast.unparse(tree)}")


# A line up to the first # that stands outside of strings, and what follows it.
_COMMENT = re.compile(r"""(?:[^"'#]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')*# ?(.*)""")


class _Builder:
    """Makes the graph whose lines are given."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.made = Graph()
        self.values: dict[str, Node] = {}
        self.number = 1  # of the line that is read

    def graph(self, lines: Iterator[_Line]) -> Graph:
        """The graph. Raises ``ParseError``, and ``SyntaxError`` if a line is none."""
        region: Region | None = None
        regions = 0
        try:
            for self.number, inside, line in lines:
                read = _read(line)
                if isinstance(read, _Signature):
                    self._begin(read)
                elif isinstance(read, _Assignment):
                    node = self._assign(read)
                    if inside:
                        node.meta["region"] = region
                elif isinstance(read, _Kernel) and not inside:
                    region = Region(read.name, regions)
                    regions += 1
                elif isinstance(read, _Result) and not inside:
                    self.made.output(self._value(read.value))
                    return self.made
                else:
                    raise ValueError("a kernel holds `name: type = op(...)` alone")
            raise ValueError("the graph returns nothing")
        except ParseError:
            raise
        except ValueError as error:
            shown = self.lines[self.number - 1].strip() if self.lines else ""
            raise ParseError(f"line {self.number}: {error}\n    {shown}") from error

    def _begin(self, read: _Signature) -> None:
        self.made = Graph(read.name, dict(read.dims), dict(read.options))
        for name, kind in read.inputs:
            self._define(self.made.placeholder(name), name, kind)

    def _assign(self, read: _Assignment) -> Node:
        args = tuple(map(self._value, read.args))
        named = {name: self._value(value) for name, value in read.named}
        node = self.made.create_node("call_function", read.target, args, named, name=read.name)
        self._define(node, read.name, read.type)
        line = self.lines[self.number - 1]
        comment = _COMMENT.fullmatch(line) if "#" in line else None
        if comment and comment[1]:
            node.meta["source"] = comment[1]
        return node

    def _define(self, node: Node, name: str, kind: Type) -> None:
        if name in self.values or name in self.made.dims or name in DTYPES or scheme_of(name):
            raise ValueError(f"the name {name} is taken")
        if node.name != name:
            node.name = name
        node.meta["type"] = kind
        self.values[name] = node

    def _value(self, read: Any) -> Any:
        """An argument, with what its words stand for."""
        if isinstance(read, _Word):
            return self._meaning(read.text)
        if isinstance(read, (list, tuple)):
            return type(read)(map(self._value, read))
        if isinstance(read, Dim):
            for name, _ in read.terms:
                self._dim(name)
        return read

    def _meaning(self, word: str) -> Any:
        if word in self.values:
            return self.values[word]
        if word in DTYPES:
            return DTYPES[word]
        return float(word) if word in ("inf", "nan") else self._dim(word)

    def _dim(self, name: str) -> Dim:
        if name not in self.made.dims:
            raise ValueError(f"unknown name {name}")
        return Dim.named(name)
