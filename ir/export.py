"""Tracing: ``torch.export`` over a row of T tokens, T dynamic, with reasons where a model cannot be traced."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import hooks
from .errors import UnsupportedModelError
from .names import source_line

# Composite operators that hide which dims they sum over.
_TAKEN_APART = frozenset({"einsum", "tensordot", "inner", "outer", "bilinear", "cosine_similarity", "moveaxis", "tile"})
# Writes that are computed without one by the operator of the same name.
_ARITHMETIC = frozenset({"add_", "sub_", "mul_", "div_"})
# Operators whose result shares its memory with nothing else.
_FRESH = frozenset({"add", "sub", "mul", "div", "sum", "softmax", "sigmoid", "topk", "gather", "linear"})
# The functions of torch's symbolic sizes that sympy itself does not have.
_FUNCTIONS = {"FloorDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod, "Min": min, "Max": max}


@dataclass(frozen=True)
class Trace:
    """An exported program, the attention calls that its layers made, and conditions on T under which it was traced."""

    program: torch.export.ExportedProgram
    calls: list[hooks.AttentionCall]
    conditions: tuple[tuple[sympy.Basic, str], ...]  # each with the line of the model's code
    most_tokens: int

    def check_conditions(self, name: str) -> None:
        """Evaluate each condition for every number of tokens.

        Raises:
            UnsupportedModelError: one of them does not hold everywhere, so the model computes something else there.
        """
        for condition, line in self.conditions:
            (symbol,) = condition.free_symbols
            holds = _evaluator(condition, symbol)
            for length in range(1, self.most_tokens + 1):
                if not holds(length):
                    text = str(condition).replace(str(symbol), "T")
                    raise UnsupportedModelError(
                        f"{name}: its code depends on the number of tokens T; the trace holds only where {text}"
                        + (f" (at {line})" if line else "")
                    )


def _evaluator(condition: sympy.Basic, symbol: Any) -> Callable[[int], bool]:
    """The condition as a function of a number; compiled where that works, for thousands of substitutions are slow."""
    try:
        compiled = sympy.lambdify(symbol, condition, modules=[_FUNCTIONS, "math"])
        compiled(1)
    except Exception:  # a function that lambdify does not know
        return lambda length: bool(condition.subs(symbol, length))
    return lambda length: bool(compiled(length))


def export(module: Any, mode: FakeTensorMode, name: str, most_tokens: int) -> Trace:
    """Trace ``module(tokens i64[T], positions i64[T])`` for every ``T`` up to ``most_tokens``.

    Raises:
        UnsupportedModelError: the model's code depends on the data or on the number of tokens; says where.
    """
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    calls: list[hooks.AttentionCall] = []
    conditions: tuple[tuple[sympy.Basic, str], ...] = ()
    try:
        try:
            with hooks.recording() as calls:
                exported = _trace(module, mode, most_tokens, deferred=False)
        except UnsupportedModelError:
            raise
        except Exception as error:
            if "onstraints violated" not in str(error):
                raise
            # Some conditions on T hold for every T, and only the solver cannot see it: keep them, and try them all.
            with hooks.recording() as calls:
                exported = _trace(module, mode, most_tokens, deferred=True)
            conditions = tuple(_conditions(exported))
        _write_apart(exported)
        if _writes_in_place(exported) or any(_packet(node.target) in _TAKEN_APART for node in _nodes(exported)):
            exported = exported.run_decompositions(dict(_decompositions()))
        return Trace(exported, calls, conditions, most_tokens)
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch.export fails in many ways; all mean the same here
        raise UnsupportedModelError(
            f"{name} cannot be traced over a flat row of tokens: {_reason(error)}{_without_attention(module.model, calls)}"
        ) from error
    finally:
        quiet.setLevel(level)


def _trace(module: Any, mode: FakeTensorMode, most_tokens: int, deferred: bool) -> torch.export.ExportedProgram:
    with mode:
        tokens = torch.zeros(7, dtype=torch.long)
        positions = torch.zeros(7, dtype=torch.long)
    length = torch.export.Dim("T", min=2, max=most_tokens)
    with torch.no_grad():
        return torch.export.export(
            module,
            (tokens, positions),
            dynamic_shapes=({0: length}, {0: length}),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )


def _conditions(exported: torch.export.ExportedProgram) -> Iterator[tuple[sympy.Basic, str]]:
    seen: set[sympy.Basic] = set()
    for node in _nodes(exported):
        if _packet(node.target) != "_assert_scalar" or not isinstance(node.args[0], torch.fx.Node):
            continue
        condition = getattr(getattr(node.args[0].meta.get("val"), "node", None), "expr", None)
        # Others are constant, or about values that depend on the data, which convert refuses.
        if isinstance(condition, sympy.Basic) and len(condition.free_symbols) == 1 and condition not in seen:
            seen.add(condition)
            yield condition, source_line(node) or source_line(node.args[0])


def _reason(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if "onstraints violated" in str(cause) or "Specializations" in str(cause):
        plain = re.sub(r"L\['tokens'\]\.size\(\)\[0\]", "T", str(cause)).replace("Specializations", "\n")
        holds = re.findall(r"generated guard (.*?)\.?$", plain, re.M) + re.findall(r"(?m)^\s*(T = \d+)$", plain)
        return f"its code depends on the number of tokens T; the trace holds only where {' and '.join(holds)[:300]}"
    return f"{type(cause).__name__}: {(lines or [''])[0][:400]}{_frame(cause)}"


def _frame(error: BaseException) -> str:
    """Where in the model's code the trace broke."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "modeling_" in file or "masking_utils" in file:
            found = f" (at {file.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _without_attention(model: Any, calls: list[hooks.AttentionCall]) -> str:
    """The first layer that did not ask for attention through ``AttentionInterface``, which is often why."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    own = {id(call.module) for call in calls}
    for where, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and count:
            for index, layer in enumerate(module):
                if not any(id(item) in own for item in layer.modules()):
                    kinds = sorted({type(item).__name__ for item in layer.children()})
                    return f"; {where}.{index} has no attention through AttentionInterface ({', '.join(kinds)})"
    return ""


@cache
def _decompositions() -> dict[Any, Any]:
    """How operators of ``_TAKEN_APART`` are. To list those of torch takes as long as all passes over a small model."""
    table: Any = torch.export.default_decompositions()
    return {op: how for op, how in table.items() if _packet(op) in _TAKEN_APART}


def _packet(target: Any) -> str:
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _nodes(exported: torch.export.ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _write_apart(exported: torch.export.ExportedProgram) -> None:
    """``x /= y`` as a value of its own, where nothing else shares the memory of ``x``.

    To have torch take all writes out of a trace takes longer than the trace itself.
    """
    place = {node: number for number, node in enumerate(_nodes(exported))}
    for node, here in place.items():
        packet, x = _packet(node.target), node.args[0] if node.args else None
        if packet not in _ARITHMETIC or not isinstance(x, torch.fx.Node):
            continue
        values = [item.meta.get("val") for item in node.all_input_nodes]
        made = x.all_input_nodes[0] if x.target is operator.getitem else x
        earlier = [user for user in x.users if place[user] < here]
        if (
            all(_packet(item.target) in _FRESH for item in (made, *earlier))
            and all(isinstance(item, torch.Tensor) and item.is_floating_point() for item in values)
            and len({item.dtype for item in values if isinstance(item, torch.Tensor)}) == 1
        ):
            _, _, overload = str(node.target).rpartition(".")
            node.target = getattr(getattr(torch.ops.aten, packet.removesuffix("_")), overload)
            for user in [user for user in x.users if place[user] > here]:
                user.replace_input_with(x, node)


def _writes_in_place(exported: torch.export.ExportedProgram) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in _nodes(exported)
    )
