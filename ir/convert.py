"""From the graph that ``torch.export`` makes to ours: weights by name, our dims, one spelling for each operation."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from . import nn
from .attention import attention
from .errors import UnsupportedModelError
from .graph import Graph
from .hooks import KNOWN_MASKS
from .infer import TypeInferenceError, infer
from .names import short_name, source_line, value_name
from .ops import aten
from .sizes import Unstatable, size_from, type_from
from .spelling import IDENTITIES, RESHAPES, SPLITS, normalize, parts_of
from .types import Dim, TensorType, Type
from .writes import WRITES, written

_DROPPED = re.compile(r"_assert|sym_constrain|_set_grad_enabled|assert_async|_check")
_LARGEST_CONSTANT = 4096
# Inputs that passes add to the graph by these names.
_LATER_INPUTS = ("slots", "block_tables", "query_starts", "context_lens", "rows")


def convert(exported: torch.export.ExportedProgram, prefix: str) -> tuple[Graph, dict[int, tuple[str, int]]]:
    """The exported program as our graph, and the mask ``(kind, window)`` of every attention layer.

    ``prefix`` is cut from the front of weight names.
    """
    work = _Conversion(exported, prefix)
    work.run()
    work.graph.eliminate_dead()
    return work.graph, work.masks


class _Conversion:
    def __init__(self, exported: torch.export.ExportedProgram, prefix: str) -> None:
        self.exported = exported
        self.prefix = prefix
        self.graph = Graph("decoder", {"T": (1, 0)})
        self.known: dict[Node, Any] = {}
        self.leaves: dict[Node, Any] = {}
        self.masks: dict[int, tuple[str, int]] = {}
        self.symbol = ""
        for name in _LATER_INPUTS:  # a weight or layer of the model may be called the same
            self.graph._graph_namespace.create_name(name, None)

    def run(self) -> None:
        signature = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        nodes = list(self.exported.graph.nodes)
        users = iter(("tokens", "positions"))
        for node in nodes:
            if node.op == "placeholder" and signature[node.name].kind == InputKind.USER_INPUT:
                made = self.graph.placeholder(next(users))
                self.symbol = self.symbol or str(node.meta["val"].shape[0])
                bounds = next(iter(self.exported.range_constraints.values()))
                self.graph.dims["T"] = (1, int(bounds.upper))
                made.meta["type"] = self.type_of(node)
                self.known[node] = made
        for node in nodes:
            if node.op == "placeholder":
                spec = signature[node.name]
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                    self.leaves[node] = spec
                elif spec.kind != InputKind.USER_INPUT:
                    raise UnsupportedModelError(f"the model takes {spec.kind.name.lower()} {node.name} as an input")
            elif node.op == "output":
                self.graph.output(self.resolve(node.args[0][0]))
            else:
                self.node(node, self.exported.graph_module)

    def node(self, node: Node, owner: torch.nn.Module) -> None:
        try:
            self.visit(node, owner)
        except (Unstatable, TypeInferenceError) as why:
            line = source_line(node)
            raise UnsupportedModelError(
                f"{value_name(node)}: {node.target}: {why}{f' (at {line})' if line else ''}"
            ) from None

    def leaf(self, node: Node) -> Node:
        """A weight or constant, made where it is first used."""
        spec = self.leaves[node]
        if spec.kind == InputKind.CONSTANT_TENSOR:
            return self.constant(self.exported.constants[spec.target], node)
        return self.weight(spec.target.removeprefix(self.prefix), node)

    def weight(self, name: str, node: Node) -> Node:
        made = self.graph.call_function(nn.weight, (name,))
        return self.finish(made, node, short_name(name), source=None)

    def constant(self, value: torch.Tensor, node: Node) -> Node:
        if value.numel() > _LARGEST_CONSTANT:
            raise UnsupportedModelError(
                f"{node.name}: a constant tensor of {value.numel()} elements is built into the model's code; "
                "register it as a buffer"
            )
        made = self.graph.call_function(nn.const, (value.tolist(), value.dtype))
        return self.finish(made, node, "const", source=None)

    def finish(self, made: Node, node: Node, name: str, source: str | None) -> Node:
        made.name = self.graph._graph_namespace.create_name(name, None)
        made.meta["type"] = self.type_of(node)
        if source:
            made.meta["source"] = source
        return made

    def type_of(self, node: Node) -> Type:
        return type_from(node.meta["val"], self.symbol)

    def resolve(self, value: Any) -> Any:
        if isinstance(value, Node):
            if value in self.known:
                return self.known[value]
            if value in self.leaves:
                self.known[value] = self.leaf(value)
                return self.known[value]
            found = value.meta.get("val")
            if isinstance(found, (torch.SymInt, int)) and not isinstance(found, bool):
                return size_from(found, self.symbol)
            raise UnsupportedModelError(f"{value.name} ({value.target}) is no tensor and no size")
        if isinstance(value, (torch.SymInt,)):
            return size_from(value, self.symbol)
        if isinstance(value, (list, tuple)):
            return [self.resolve(item) for item in value]
        if isinstance(value, dict):
            return {name: self.resolve(item) for name, item in value.items()}
        return value

    def visit(self, node: Node, owner: torch.nn.Module) -> None:
        if node.op == "get_attr":
            self.known[node] = getattr(owner, str(node.target), None)
            return
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.inline(node, owner)
            return
        if target is operator.getitem and isinstance(self.known.get(node.args[0]), (list, tuple)):  # type: ignore[arg-type]
            self.known[node] = self.known[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        found = node.meta.get("val")
        if _DROPPED.search(str(target)) or found is None or not isinstance(found, (torch.Tensor, list, tuple)):
            return  # assertions, and arithmetic on sizes, which becomes part of the arguments
        if target is operator.getitem:
            base = self.known[node.args[0]]  # type: ignore[index]
            self.known[node] = self.finish(
                self.graph.call_function(target, (base, node.args[1])), node, f"{base.name}_{node.args[1]}", None
            )
            return
        self.known[node] = self.call(node, target)

    def inline(self, node: Node, owner: torch.nn.Module) -> None:
        """Regions under ``no_grad`` or ``autocast(enabled=False)`` arrive as sub-graphs; their body is what counts."""
        arguments_known: list[Any] = [self.known.get(item) if isinstance(item, Node) else None for item in node.args]
        bodies = [(i, item) for i, item in enumerate(arguments_known) if isinstance(item, torch.fx.GraphModule)]
        if len(bodies) != 1 or "wrap" not in str(node.target):
            raise UnsupportedModelError(f"{node.name}: control flow ({node.target}) depends on the data")
        place, body = bodies[0]
        arguments = iter(node.args[place + 1 :])
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.known[inner] = self.resolve(next(arguments))
            elif inner.op == "output":
                result = self.resolve(inner.args[0])
                self.known[node] = result if isinstance(result, (list, tuple)) else (result,)
            else:
                self.node(inner, body)

    def call(self, node: Node, target: Any) -> Any:
        name = str(target)
        if not isinstance(target, torch._ops.OpOverload):
            raise UnsupportedModelError(f"{node.name}: {name} is no tensor operator")
        args, kwargs = self.resolve(list(node.args)), self.resolve(dict(node.kwargs))
        if target.namespace == "fuseline":
            return self.own(node, target, args)
        if target.namespace != "aten":
            raise UnsupportedModelError(f"{node.name}: operator {name} has no lowering")
        short = name.removeprefix("aten.")
        packet = short.partition(".")[0]
        if packet in IDENTITIES or (packet == "dropout" and not args[2]):
            return args[0]
        if packet == "arange" and (counted := self.counted(node, args)) is not None:
            return counted
        if packet in WRITES:
            return written(packet, args, lambda target, inputs: self.derived(node, target, inputs))
        if packet in SPLITS:
            return self.pieces(node, packet, args)
        result = self.type_of(node)
        if packet in ("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"):
            assert isinstance(result, TensorType)
            if result.dtype == args[0].meta["type"].dtype:
                return args[0]
            return self.make(node, aten("to.dtype"), (args[0], result.torch_dtype), {})
        if packet in RESHAPES:
            assert isinstance(result, TensorType)
            if result.shape == args[0].meta["type"].shape:
                return args[0]
            return self.make(node, aten(RESHAPES[packet]), (args[0], list(result.shape)), {})
        if packet == "slice" and isinstance(result, TensorType) and result.shape == args[0].meta["type"].shape:
            return args[0]
        if packet == "cat":
            # Parts of no width come from models that split off nothing.
            parts = [item for item in args[0] if 0 not in item.meta["type"].shape]
            if len(parts) == 1:
                return parts[0]
            args = [parts, *args[1:]]
        if packet == "topk":
            args = args[:4]  # where any order will do, that of size does
        rank = next((item.meta["type"].rank for item in _flat(args) if isinstance(item, Node)), 0)
        target, args, kwargs = normalize(target, args, kwargs, rank)
        return self.make(node, target, tuple(args), kwargs)

    def pieces(self, node: Node, packet: str, args: list[Any]) -> list[Node]:
        """The parts of a split."""
        kinds = self.type_of(node)
        assert isinstance(kinds, tuple)
        made = []
        for index, (target, arguments) in enumerate(parts_of(packet, args, kinds)):
            part = self.graph.call_function(target, arguments)
            part.name = self.graph._graph_namespace.create_name(f"{value_name(node)}_{index}", None)
            part.meta["type"] = kinds[index]
            part.meta["source"] = source_line(node)
            made.append(part)
        return made

    def own(self, node: Node, target: Any, args: list[Any]) -> Any:
        match target._schema.name:
            case "fuseline::mask":
                return ("mask", args[1], args[2])
            case "fuseline::grouped_linear":
                kept = args if args[4] else args[:4] if args[3] is not None else args[:3]
                return self.make(node, nn.grouped_linear, tuple(kept), {}, "experts")
        mask, layer = args[3], args[5]
        where = value_name(node, "attention")
        if not (isinstance(mask, tuple) and mask[0] == "mask"):
            raise UnsupportedModelError(
                f"{where}: it changes its attention mask or builds its own; only the causal, sliding and chunked masks of "
                "transformers.masking_utils are known"
            )
        if mask[1] not in KNOWN_MASKS:
            raise UnsupportedModelError(f"{where}: its attention mask is {mask[1]}; no kernel computes it")
        self.masks[layer] = (mask[1], mask[2])
        return self.make(node, attention, attention_arguments(args, len(self.masks) - 1), {}, "attention")

    def counted(self, node: Node, args: list[Any]) -> Node | None:
        """``arange(T)``: a token's place in the row of one sequence is its position."""
        start, end = (0, args[0]) if len(args) == 1 else args[:2]
        if not isinstance(start, int) or Dim.build({"T": 1}, start) != end or args[2:] not in ([], [1]):
            return None
        positions = self.graph.input("positions")
        result = self.type_of(node)
        assert isinstance(result, TensorType)
        if start:
            positions = self.derived(node, aten("add.Tensor"), (positions, start))
        return (
            positions
            if result.dtype == "i64"
            else self.derived(node, aten("to.dtype"), (positions, result.torch_dtype))
        )

    def derived(self, node: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """A call that stands for a part of ``node``; its type is inferred."""
        made = self.graph.call_function(target, args)
        made.name = self.graph._graph_namespace.create_name(value_name(node), None)
        made.meta["type"] = infer(target, args, {})
        made.meta["source"] = source_line(node)
        return made

    def make(self, node: Node, target: Callable[..., Any], args: Any, kwargs: Any, name: str = "") -> Node:
        made = self.graph.call_function(target, tuple(args), kwargs)
        return self.finish(made, node, value_name(node, name), source_line(node))


def attention_arguments(traced: list[Any], layer: int) -> tuple[Any, ...]:
    """The arguments of ``nn.attention``, defaults left out; layers are counted in the order in which they attend."""
    q, k, v, (_, kind, window), sinks, _, scale, softcap = traced
    full = [q, k, v, layer, scale, kind, window, softcap, sinks]
    defaults = ["causal", 0, 0.0, None]
    while defaults and full[-1] == defaults[-1]:
        full.pop()
        defaults.pop()
    return tuple(full)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
