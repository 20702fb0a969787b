"""DropBatchDim: models are traced over ``[1, T, ...]``; rows of tokens need no leading 1."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir.graph import Graph, flat_types, node_inputs, type_of
from ..ir.infer import infer
from ..ir.ops import POINTWISE, aten, op_name
from ..ir.types import Dim
from .ledger import PassReport

# Operators that name dims from the right only, so that they work alike without the leading dim.
_FROM_THE_RIGHT = frozenset(
    f"aten.{name}"
    for name in (
        "linear embedding mean.dim sum.dim_IntList amax softmax.int _softmax topk slice.Tensor cat stack "
        "transpose.int unsqueeze squeeze.dim select.int layer_norm rms_norm repeat_interleave.self_int "
        "max.dim sort argsort cumsum gather var.dim norm.ScalarOpt_dim linalg_vector_norm log_softmax.int"
    ).split()
) | {"nn.attention", "nn.rms_norm", "nn.layer_norm"}


_REMOVES_DIM = frozenset({"aten.select.int", "aten.squeeze.dim"})

# Of their operands only one has rows; the others are tables and matrices.
_ONE_ROW_OPERAND = frozenset({"aten.linear", "aten.embedding"})


class _Refused(Exception):
    """This operator keeps its batch dim."""


def drop_batch_dim(graph: Graph, report: PassReport) -> Graph:
    """Remove the leading dim of size 1 from every value that has one because the tokens were given as ``[1, T]``, and then
    from those to which a model gave another one: ``[1, 1, T, ...]``, a single head in front of its rows."""
    if not report.allows("graph"):
        return graph
    found = _without_leading(graph, report)
    while any(map(_adds_batch, found.calls())):
        further = PassReport(report.name)
        made = _without_leading(found, further)
        if _led(made) >= _led(found):
            break
        found = made
        known = {item.site for item in report.refused}
        report.refused += [item for item in further.refused if item.site not in known]
    return found


def _led(graph: Graph) -> int:
    """How many values have a dim of size 1 in front of their rows."""
    shapes = [flat_types(node.meta["type"])[0].shape for node in graph.calls()]
    return sum(len(shape) > 1 and shape[0] == 1 and isinstance(shape[1], Dim) for shape in shapes)


def _without_leading(old: Graph, report: PassReport) -> Graph:
    """The graph without the leading dim of size 1 where it enters or is added, and behind."""
    new = Graph(old.name, old.dims, old.options)
    # For each old value: the new one, and whether it lacks the leading dim.
    known: dict[Node, tuple[Node, bool]] = {}

    def keep(node: Node) -> Node:
        """The new value in its old shape."""
        made, dropped = known[node]
        if not dropped:
            return made
        shape = type_of(node).shape
        return emit(aten("reshape"), (made, list(shape)), {}, f"{node.name}_batched", "")

    def emit(target: Any, args: Any, kwargs: Any, name: str, source: str) -> Node:
        made = new.call_function(target, tuple(args), kwargs)
        made.name = new._graph_namespace.create_name(name, None)
        made.meta["type"] = infer(target, made.args, dict(made.kwargs))
        if source:
            made.meta["source"] = source
        return made

    def mapped(value: Any, convert: Any) -> Any:
        if isinstance(value, Node):
            return convert(value)
        if isinstance(value, (list, tuple)):
            return [mapped(item, convert) for item in value]
        if isinstance(value, dict):
            return {name: mapped(item, convert) for name, item in value.items()}
        return value

    def again(node: Node, convert: Any) -> Node:
        """The same call on converted operands."""
        target: Any = node.target
        made = new.call_function(target, tuple(mapped(node.args, convert)), mapped(node.kwargs, convert))
        made.name = new._graph_namespace.create_name(node.name, None)
        made.meta = dict(node.meta)
        return made

    def without(node: Node) -> tuple[Any, Any]:
        """Arguments of the operator, positional and by name, without the leading dim."""
        rank = max(len(flat_types(item.meta["type"])[0].shape) for item in node.all_input_nodes if known[item][1])

        def convert(item: Node) -> Node:
            made, dropped = known[item]
            kind = item.meta["type"]
            if dropped or not hasattr(kind, "shape") or kind.rank < rank or op_name(node.target) in _ONE_ROW_OPERAND:
                return made
            if kind.rank == rank and kind.shape[0] == 1:
                return emit(aten("reshape"), (made, list(kind.shape[1:])), {}, f"{item.name}_row", "")
            raise _Refused

        return mapped(node.args, convert), mapped(node.kwargs, convert)

    def repeated(made: Node, node: Node) -> Node:
        """Rows for several heads, whose dim was the leading one: repeated behind the tokens, and turned back."""
        shape, rank = list(type_of(node).shape), type_of(made).rank
        if not known[node.args[0]][1] or shape[1:] != list(type_of(made).shape):  # type: ignore[index]
            raise _Refused
        single = emit(aten("unsqueeze"), (made, -rank), {}, f"{node.name}_single", "")
        wide = emit(aten("expand"), (single, [shape[1], shape[0], *shape[2:]]), {}, f"{node.name}_rows", "")
        return emit(aten("transpose.int"), (wide, -rank - 1, -rank), {}, node.name, node.meta.get("source", ""))

    for node in old.nodes:
        source = node.meta.get("source", "")
        if node.op == "placeholder":
            made = new.placeholder(node.name)
            made.meta = dict(node.meta)
            known[node] = (made, False)
            continue
        if node.op == "output":
            new.output(mapped(node.args[0], keep))
            continue
        name, shape = op_name(node.target), flat_types(node.meta["type"])[0].shape
        touched = any(known[item][1] for item in node_inputs([node.args, node.kwargs]))
        enters = not touched and _enters(node)
        operand: Any = node.args[0] if node.args else None
        try:
            if enters:
                known[node] = (known[operand][0], True)
                report.fused.append(node.name)
            elif name in ("aten.reshape", "aten.expand") and (touched or _adds_batch(node)):
                made, _ = known[operand]
                leading = bool(shape) and shape[0] == 1 and len(shape) > 1
                target_shape = list(shape[1:]) if leading else list(shape)
                if name == "aten.expand" and not leading:
                    known[node] = (repeated(made, node), False)
                elif type_of(made).shape == tuple(target_shape):
                    known[node] = (made, leading)
                else:
                    known[node] = (emit(node.target, (made, target_shape), {}, node.name, source), leading)
            elif touched and name in _REMOVES_DIM and _axis(node) == -type_of(operand).rank:
                known[node] = (known[operand][0], False)
            elif touched and name == "getitem":
                base, dropped = known[operand]
                made = new.call_function(node.target, (base, node.args[1]))
                made.name = node.name
                made.meta = {**node.meta, "type": base.meta["type"][node.args[1]]}
                known[node] = (made, dropped)
            elif touched and (name in POINTWISE or name in _FROM_THE_RIGHT) and not _on_batch(node):
                args, kwargs = without(node)
                known[node] = (emit(node.target, args, kwargs, node.name, source), True)
            elif touched:
                raise _Refused
            else:
                known[node] = (again(node, lambda item: known[item][0]), False)
        except _Refused:
            report.refuse(node.name, f"{name} is not known to work without its leading dim", node)
            known[node] = (again(node, keep), False)
    return new


def _enters(node: Node) -> bool:
    """``unsqueeze(tokens, 0)``: where the leading dim comes from."""
    if op_name(node.target) != "aten.unsqueeze" or not isinstance(node.args[0], Node):
        return False
    source = type_of(node.args[0])
    leading = bool(node.args[1] == -source.rank - 1)
    return node.args[0].op == "placeholder" and leading and isinstance(source.shape[0], Dim)


def _adds_batch(node: Node) -> bool:
    """``reshape(x, [1, T, ...])`` of rows of tokens."""
    if op_name(node.target) != "aten.reshape":
        return False
    shape = type_of(node).shape
    source = type_of(node.args[0]).shape if isinstance(node.args[0], Node) else ()
    return len(shape) > 1 and shape[0] == 1 and isinstance(shape[1], Dim) and source[:1] == shape[1:2]


def _axis(node: Node) -> int:
    axis = node.args[1] if len(node.args) > 1 else 0
    return axis if isinstance(axis, int) else 0


def _on_batch(node: Node) -> bool:
    """Whether a dim argument of the operator names the leading dim itself."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    rank = max((len(flat_types(item.meta["type"])[0].shape) for item in node_inputs(node.args)), default=0)
    if op_name(node.target) in ("aten.unsqueeze", "aten.stack"):
        rank += 1
    for argument, value in zip(schema.arguments, node.args):
        if argument.name in ("dim", "dims", "dim0", "dim1"):
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, int) and item <= -rank for item in values):
                return True
    return False
