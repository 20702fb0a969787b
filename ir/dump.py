"""Graph to text: one Python-syntax function, one value a line."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from .graph import Graph, Region
from .ops import op_name
from .types import DTYPE_NAMES, Dim, type_text

INDENT = "    "


def dump(graph: Graph) -> str:
    """The text of a graph. ``parse(dump(graph))`` rebuilds the same graph, and ``dump(parse(text)) == text``."""
    lines = [signature(graph)]
    region: Region | None = None
    for node in graph.calls():
        inside: Region | None = node.meta.get("region")
        if inside is not None and inside != region:
            lines.append(f'{INDENT}with kernel("{inside.name}"):')
        region = inside
        lines.append((INDENT * 2 if inside else INDENT) + line_of(node))
    result = graph.output_node().args[0]
    lines.append(f"{INDENT}return {value_text(result)}")
    return "\n".join(lines) + "\n"


def signature(graph: Graph) -> str:
    """The first line: inputs with their types, then the dims with their ranges and the options."""
    inputs = [f"{node.name}: {type_text(node.meta['type'])}" for node in graph.inputs()]
    named = [f"{name}: dim({low}, {high})" for name, (low, high) in graph.dims.items()]
    named += [f"{name}: option({value_text(value)})" for name, value in graph.options.items()]
    return f"def {graph.name}({', '.join(inputs + (['*', *named] if named else []))}):"


def line_of(node: Node) -> str:
    """The line that defines a value."""
    line = f"{node.name}: {type_text(node.meta['type'])} = {call_text(node)}"
    source = node.meta.get("source")
    return f"{line}  # {source}" if source else line


def call_text(node: Node) -> str:
    """The right-hand side of a value's line."""
    if node.target is operator.getitem:
        return f"{value_text(node.args[0])}[{node.args[1]}]"
    arguments = [value_text(item) for item in node.args]
    arguments += [f"{name}={value_text(item)}" for name, item in node.kwargs.items()]
    return f"{op_name(node.target)}({', '.join(arguments)})"


def value_text(value: Any) -> str:
    """An argument as it stands in the text."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        body = ", ".join(map(value_text, value))
        return f"[{body}]" if isinstance(value, list) else f"({body},)" if len(value) == 1 else f"({body})"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (bool, int, float, Dim)):
        return str(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) has no text form")
