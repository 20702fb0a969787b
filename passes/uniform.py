"""DropUniformMasks: a mask that is the same everywhere selects nothing.

Routers choose among groups of experts before they choose experts, and a model with one group, or one that takes all of them,
does so, too: it masks nothing, by way of half a dozen operators.
"""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from .ledger import PassReport, asks_first

_VIEWS = frozenset(f"aten.{name}" for name in "reshape unsqueeze expand squeeze.dim slice.Tensor transpose.int".split())
_CHANGES = frozenset({"aten.to.dtype", "aten.bitwise_not", "aten.logical_not"})
_FILLED = {"aten.zeros_like": 0, "aten.ones_like": 1}
Number = bool | int | float


@asks_first
def drop_uniform_masks(graph: Graph, report: PassReport) -> Graph:
    """``masked_fill(x, mask, v)`` is ``x`` where the mask is false everywhere, ``where(mask, a, b)`` is ``a`` where it is true."""
    for node in list(graph.calls()):
        kept = _selected(node)
        if kept is None or kept.meta["type"] != node.meta["type"] or not report.allows(node.name):
            continue
        node.replace_all_uses_with(kept)
        graph.erase_node(node)
        report.fused.append(kept.name)
    if report.fused:
        graph.eliminate_dead()
    return graph


def _selected(node: Node) -> Node | None:
    """The operand whose numbers are those of a selection by a mask that is the same everywhere."""
    name = op_name(node.target)
    if name not in ("aten.masked_fill.Scalar", "aten.where.self"):
        return None
    mask = node.args[0 if name == "aten.where.self" else 1]
    value = uniform(mask) if isinstance(mask, Node) else None
    if value is None:
        return None
    if name == "aten.masked_fill.Scalar":
        kept = None if value else node.args[0]
    else:
        kept = node.args[1 if value else 2]
    return kept if isinstance(kept, Node) else None


def uniform(node: Node) -> Number | None:
    """The number that all elements of a value are, whatever the inputs; nothing if they may differ."""
    name, kind = op_name(node.target) if node.op == "call_function" else "", node.meta["type"]
    if name in _FILLED:
        return _FILLED[name]
    if name == "aten.full_like":
        return _number(node.args[1])
    if name == "aten.scatter.value":
        return _number(node.args[3]) if _covers(node) else None
    source = node.args[0] if name in _VIEWS | _CHANGES else None
    found = uniform(source) if isinstance(source, Node) else None
    if found is None or name in _VIEWS:
        return found
    if name == "aten.to.dtype":
        kinds = {"bool": bool, "i64": int, "i32": int, "f32": float}  # other types may round it
        return kinds[kind.dtype](found) if kind.dtype in kinds else None
    return not found if kind.dtype == "bool" else None


def _number(value: object) -> Number | None:
    """A number that every element type holds exactly."""
    whole = isinstance(value, (bool, int, float)) and float(value).is_integer()
    return value if whole and abs(value) < 128 else None  # type: ignore[arg-type,return-value]


def _covers(scatter: Node) -> bool:
    """Whether something is written to every place: to the columns of the largest numbers, of which there are all."""
    base, dim, index = scatter.args[:3]
    if not isinstance(base, Node) or not isinstance(index, Node) or type_of(base).shape != type_of(index).shape:
        return False
    top = index.args[0] if op_name(index.target) == "getitem" and index.args[1] == 1 else None
    if not isinstance(top, Node) or op_name(top.target) != "aten.topk":
        return False
    source = top.args[0]
    along = top.args[2] if len(top.args) > 2 else -1
    assert isinstance(source, Node) and isinstance(dim, int) and isinstance(along, int)
    rank = type_of(base).rank
    return dim % rank == along % rank and type_of(source).shape[along] == top.args[1]
