"""Quantize: the weights of projections are held in few bits, as the caller asked by patterns over their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import POINTWISE, PROJECTIONS, aten, op_name, resolve
from ..ir.quantized import is_quantised
from ..ir.schemes import scheme_of
from ..ir.types import TensorType
from .ledger import PassReport, asks_first
from .projections import is_grouped, is_projection

OPTION = "quantization"
SMOOTHING = "smoothing"
# Factors that are tried for each row of a weight in E4M3; twice as many lessen the squared error by 2 %.
_TRIES = 16
Wanted = Mapping[str, str | None]
"""Schemes by pattern (``None``: as it is); the first pattern that fits the name of a weight decides."""


def spelled(wanted: Wanted) -> str:
    """What is wanted, as a graph's option states it."""
    return ", ".join(f"{pattern}: {scheme or 'none'}" for pattern, scheme in wanted.items())


def wanted_of(graph: Graph) -> dict[str, str | None]:
    """What a graph's option states."""
    entries = [entry.rpartition(": ") for entry in str(graph.options.get(OPTION, "")).split(", ") if entry]
    return {pattern: None if scheme == "none" else scheme for pattern, _, scheme in entries}


def pattern_of(weight: str, wanted: Wanted) -> str | None:
    """The first pattern that fits the name of a weight, with or without its last part: ``*.q_proj``, ``lm_head``."""
    module = weight.rpartition(".")[0]
    names = (weight, module, f".{module}")
    return next((pattern for pattern in wanted if any(fnmatchcase(name, pattern) for name in names)), None)


@asks_first
def quantize(graph: Graph, report: PassReport) -> Graph:
    """Round the weights of projections and experts to nearest where a pattern asks for it, and the rows that meet them if the
    scheme is dynamic.

    With the option ``smoothing`` (there will be a calibration) rows that become whole codes are divided by a vector, and the
    weight is multiplied by it.
    Embeddings stay as they are, and so do the output projection and routers, unless a pattern other than ``*`` names
    one: a router is small, and what it scores wrongly goes to another expert.

    Raises:
        UnsupportedModelError: a weight cannot be held in the scheme asked for, or a pattern fits no weight.
    """
    wanted = wanted_of(graph)
    used: set[str] = set()
    kept = dict.fromkeys(_routers(graph), "a router") | dict.fromkeys(
        _output_projection(graph), "the output projection"
    )
    for node in list(graph.calls()):
        if not is_projection(node):
            continue
        grouped = is_grouped(node)
        place = 2 if grouped else 1
        weight = node.args[place]
        assert isinstance(weight, Node)
        if not is_constant(weight):
            continue
        again = is_quantised(weight)  # the pass has been here
        patterns = {name: pattern_of(name, wanted) for name in sorted(matrices_of(weight))}
        used.update(pattern for pattern in patterns.values() if pattern)
        schemes = {wanted[pattern] if pattern else None for pattern in patterns.values()}
        scheme = next(iter(schemes)) if len(schemes) == 1 else None
        if len(schemes) > 1:
            raise _refusal(patterns, "parts of one weight are asked for in several schemes", wanted)
        if scheme is None or again:
            continue
        if node in kept and "*" in patterns.values():
            report.refuse(node.name, f"{kept[node]} stays as it is unless a pattern names it", node)
            continue
        turned = grouped and len(node.args) > 4 and bool(node.args[4])
        why = _reason_against(weight, scheme, grouped, turned)
        if why:
            raise _refusal(patterns, why, wanted)
        if not report.allows(node.name):
            continue
        known = [item for item in weight.users if op_name(item.target) == "nn.quantize" and item.args[1] == scheme]
        found = scheme_of(scheme)
        dynamic, tries = (found.dynamic, _TRIES if found.floats else 1) if found else (False, 1)
        divisors: Node | None = None
        if graph.options.get(SMOOTHING) and dynamic and tries == 1 and not grouped:
            weight, divisors = _smoothed(graph, node, weight, report)
            known = [item for item in weight.users if op_name(item.target) == "nn.quantize"]
        made = known[0] if known and known[0] < node else None
        if turned:
            # Codes lie along the inputs, which a factor is for.
            name = f"{weight.name}_turned"
            turn = aten("transpose.int")
            weight = insert_before(graph, node, turn, (weight, 1, 2), name=name, source=report.name)
            node.args = (*node.args[:4], False)
        if made is None:
            made = _rounded(graph, node, weight, scheme, report, tries)
        node.args = (*node.args[:place], made, *node.args[place + 1 :])
        if dynamic:
            round_rows(graph, node, scheme, report, divisors)
        report.fused.append(node.name)
    unused = [pattern for pattern in wanted if pattern not in used and pattern != "*"]
    if unused:
        raise UnsupportedModelError(f"quantization: {unused[0]!r} fits the name of no projection's weight")
    return graph


def round_rows(graph: Graph, linear: Node, scheme: str, report: PassReport, divisors: Node | None = None) -> None:
    """Let a projection, or that of experts, whose weight is in a dynamic scheme round its rows: a product of codes.

    Each projection rounds its rows itself: they are no value of their own, but the first part of its kernel.
    """
    rows, dtype = linear.args[0], type_of(linear).torch_dtype
    assert isinstance(rows, Node)
    rounded = _rounded(graph, linear, rows, scheme, report, divisors=divisors)
    if is_grouped(linear):
        full = (*linear.args, *(None, False, None)[len(linear.args) - 3 :])
        linear.args = (rounded, *full[1:6], dtype)
        return
    weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    linear.target = resolve("nn.scaled_linear")
    linear.args = (rounded, weight, bias, dtype)


def _rounded(
    graph: Graph,
    user: Node,
    value: Node,
    scheme: str,
    report: PassReport,
    tries: int = 1,
    divisors: Node | None = None,
) -> Node:
    """A value in codes, in front of its user."""
    name, call = f"{value.name}_{scheme}", resolve("nn.quantize")
    more = (tries, divisors) if divisors is not None else (tries,) if tries > 1 else ()
    return insert_before(graph, user, call, (value, scheme, *more), name=name, source=report.name)


def _smoothed(graph: Graph, user: Node, weight: Node, report: PassReport) -> tuple[Node, Node]:
    """A weight times its smoothing, and the smoothing, in front of a user; those of an earlier user if there are."""
    for vector in weight.users:
        if op_name(vector.target) == "nn.smoothing" and vector < user:
            return next(item for item in vector.users if op_name(item.target) == "aten.mul.Tensor"), vector
    name, call = f"{weight.name}_smoothing", resolve("nn.smoothing")
    vector = insert_before(graph, user, call, (weight,), name=name, source=report.name)
    name, call = f"{weight.name}_smoothed", resolve("aten.mul.Tensor")
    return insert_before(graph, user, call, (weight, vector), name=name, source=report.name), vector


def same_scheme(linears: Sequence[Node], graph: Graph) -> bool:
    """Whether the weights of projections are held in one scheme, in one order of inputs, or asked for in one."""
    wanted = wanted_of(graph)
    weights = [node.args[1] for node in linears]
    if any(isinstance(item, Node) and op_name(item.target) == "aten.index_add" for item in weights):
        return False  # the graph does not say whether two orders are equal
    found: set[str | None] = set()
    for leaf in (leaf for item in weights if isinstance(item, Node) and is_constant(item) for leaf in _matrices(item)):
        pattern = pattern_of(str(leaf.args[0]), wanted)
        found.add(type_of(leaf).dtype if is_quantised(leaf) else wanted[pattern] if pattern else None)
    return len(found) < 2


def matrices_of(value: Node) -> set[str]:
    """The names of the matrices that a constant is made from."""
    return {str(leaf.args[0]) for leaf in _matrices(value)}


def _matrices(value: Node) -> Iterator[Node]:
    if str(value.target) == "weight":
        kind = value.meta["type"]
        if isinstance(kind, TensorType) and kind.rank > 1:
            yield value
    for source in value.all_input_nodes:
        yield from _matrices(source)


def _reason_against(weight: Node, name: str, grouped: bool, turned: bool) -> str:
    """Why a weight cannot be held in a scheme; empty if it can. ``turned``: its rows are those of the inputs."""
    scheme, kind = scheme_of(name), type_of(weight)
    assert scheme is not None
    depth = kind.shape[-2 if turned else -1]
    if kind.rank != 2 + grouped or not isinstance(depth, int) or not kind.torch_dtype.is_floating_point:
        return f"{kind} is no matrix of floats"
    return scheme.reason_against(depth)


def _refusal(patterns: Mapping[str, str | None], why: str, wanted: Wanted) -> UnsupportedModelError:
    name = next(iter(patterns))
    pattern = next(pattern for pattern in patterns.values() if pattern)
    module = name.rpartition(".")[0].rpartition(".")[2]
    return UnsupportedModelError(
        f"quantization: {name} cannot be {wanted[pattern]}, which {pattern!r} asks for: {why}; ask for another scheme, "
        f"or none, for it: {{{(f'*.{module}' if module else name)!r}: None, ...}}"
    )


def _output_projection(graph: Graph) -> list[Node]:
    """The projection that makes the graph's result, through work on single elements, if there is one."""
    value = graph.output_node().args[0]
    while isinstance(value, Node) and value.op == "call_function":
        if op_name(value.target) in PROJECTIONS:
            return [value]
        if op_name(value.target) not in POINTWISE | {"aten.reshape", "aten.slice.Tensor"}:
            return []
        value = next((item for item in value.all_input_nodes if not is_constant(item)), None)
    return []


def _routers(graph: Graph) -> set[Node]:
    """The projections whose results, one for each expert, decide which experts a token goes to."""
    found: set[Node] = set()
    for node in graph.calls():
        if op_name(node.target) != "nn.grouped_linear":
            continue
        ids, weight = node.args[1:3]
        assert isinstance(ids, Node) and isinstance(weight, Node)
        seen, stack = {ids}, [ids]
        while stack:
            value = stack.pop()
            if op_name(value.target) in PROJECTIONS:
                if type_of(value).shape[-1] == type_of(weight).shape[0]:
                    found.add(value)
                continue
            stack += [item for item in value.all_input_nodes if item not in seen]
            seen.update(value.all_input_nodes)
    return found
