"""FoldNormScales: the scale of a norm goes into the weights of the projections that read it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.graph import Graph, is_constant, type_of
from ..ir.ops import aten, op_name
from ..ir.quantized import is_quantised
from ..ir.types import TensorType
from .ledger import PassReport, asks_first


@asks_first
def fold_norm_scales(graph: Graph, report: PassReport) -> Graph:
    """``linear(rms_norm(x, scale), w)`` is ``linear(rms_norm(x), w * scale)``, whose weight is computed once.

    What is left of the norm is one factor for each row, which a kernel can apply to the rows of the product: it then
    reads ``x`` as it is.
    """
    lookups = [node for node in graph.calls() if op_name(node.target) == "aten.embedding"]
    tables = {type_of(node.args[0]) for node in lookups if isinstance(node.args[0], Node)}
    for norm in list(graph.calls()):
        if op_name(norm.target) != "nn.rms_norm" or not isinstance(norm.args[1], Node):
            continue
        projections = [user for user in norm.users if op_name(user.target) == "aten.linear" and user.args[0] is norm]
        if not projections:
            continue
        why, blocking = _reason_against(norm, norm.args[1], projections, tables)
        if why:
            report.refuse(norm.name, why, blocking)
            continue
        if not report.allows(norm.name):
            continue
        for linear in projections:
            weight, *bias = linear.args[1:]
            assert isinstance(weight, Node)
            name = f"{weight.name}_scaled"
            scaled = insert_before(
                graph, linear, aten("mul.Tensor"), (weight, norm.args[1]), name=name, source=report.name
            )
            linear.args = (norm, scaled, *bias)
        norm.args = (norm.args[0], None, *norm.args[2:])
        report.fused.append(norm.name)
    return graph


def _reason_against(
    norm: Node, scale: Node, projections: Sequence[Node], tables: Collection[TensorType]
) -> tuple[str, Node]:
    """Why a norm keeps its scale, and the node that stands in the way; an empty reason if nothing does.

    ``tables`` are the types of embeddings. The text does not say which weights are tied to one, and a scaled copy would
    take as much memory again.
    """
    for user in norm.users:
        if user not in projections:
            return f"{user.name} reads it beside a projection", user
    if not is_constant(scale):
        return "the scale is computed from the tokens", scale
    for linear in projections:
        weight = linear.args[1]
        if not isinstance(weight, Node) or not is_constant(weight):
            return "a weight is computed from the tokens", linear
        if is_quantised(weight):
            return f"{weight.name} is rounded", weight
        if len(weight.users) > 1:
            return f"{weight.name} has another reader", weight
        if type_of(weight) in tables:
            return f"{weight.name} may be tied to an embedding, which would be held twice", weight
        if not type_of(scale).dtype == type_of(weight).dtype == type_of(norm).dtype:
            return "scale, weight and rows differ in type", scale
        if type_of(weight).dtype == "f16":
            return "products of small f16 weights would lose digits", weight
    return "", norm
