"""ReadRounded: projections read the codes of weights that a checkpoint holds rounded, instead of the numbers."""

from __future__ import annotations

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import aten, op_name, resolve
from ..ir.quantized import is_quantised
from ..ir.schemes import scheme_of
from .ledger import PassReport
from .projections import is_grouped
from .quantize import round_rows


def read_rounded(graph: Graph, report: PassReport) -> Graph:
    """``linear(x, to(codes))`` is ``linear(x, codes)``; where weights are joined, so are their codes. Where the columns of a
    weight have an order of their own, the columns of the rows get it, too.

    Raises:
        UnsupportedModelError: something else than a projection reads a rounded weight: it would be held in full.
    """
    off = False
    for node in list(graph.calls()):
        place = _place_of_weight(node)
        weight = node.args[place] if place else None
        order: Node | None = None
        if isinstance(weight, Node) and op_name(weight.target) == "aten.index_add":
            order, weight = weight.args[2:4]  # type: ignore[assignment]
        codes = _codes(graph, weight, node) if isinstance(weight, Node) and is_constant(weight) else None
        if codes is None:
            continue
        if not report.allows(node.name):
            off = True
            continue
        rows = node.args[0]
        if order is not None:
            rows = insert_before(graph, node, aten("index_select"), (rows, -1, order), source=report.name)
        node.args = (rows, *node.args[1:place], codes, *node.args[place + 1 :])
        scheme = scheme_of(type_of(codes).dtype)
        if scheme and scheme.dynamic:
            round_rows(graph, node, scheme.name, report)
        report.fused.append(node.name)
    graph.eliminate_dead()
    for node in [] if off else graph.calls():
        if str(node.target) == "weight" and is_quantised(node):
            readers = [
                user for user in node.users if not is_quantised(user) and op_name(user.target) == "aten.to.dtype"
            ]
            if readers:
                user = next(iter(readers[0].users), readers[0])
                raise UnsupportedModelError(
                    f"the checkpoint holds {node.args[0]} as {type_of(node)}, and {user.name} ({op_name(user.target)}) "
                    "reads its numbers: only projections can read codes; give a checkpoint with this weight unrounded"
                )
    return graph


def _place_of_weight(node: Node) -> int:
    """Where the weight is among the arguments of a projection, or of one of experts whose factors lie along the inputs, as
    those of checkpoints do; else 0."""
    if is_grouped(node):
        turned = len(node.args) > 4 and bool(node.args[4])
        return 0 if turned else 2
    return 1 if op_name(node.target) == "aten.linear" else 0


def _codes(graph: Graph, value: Node, place: Node) -> Node | None:
    """The rounded matrix whose numbers a value is; nothing if there is none."""
    name = op_name(value.target)
    if name == "aten.to.dtype" and isinstance(value.args[0], Node) and is_quantised(value.args[0]):
        return value.args[0]
    if name != "aten.cat" or value.args[1:] not in ((), (0,)):
        return None
    parts = value.args[0]
    assert isinstance(parts, (list, tuple))
    found = [_codes(graph, part, place) for part in parts if isinstance(part, Node)]
    codes = [part for part in found if part is not None]
    if len(codes) != len(parts) or len({type_of(part).dtype for part in codes}) != 1:
        return None
    return insert_before(graph, place, resolve("nn.cat_rows"), (codes,), name=f"{value.name}_codes")
