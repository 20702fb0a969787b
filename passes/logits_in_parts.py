"""LogitsInParts: who chooses tokens from logits gets the parts that the ranks have, and gathers what it needs of them."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from ..ir.placement import VOCABULARY
from .ledger import PassReport, asks_first


@asks_first
def logits_in_parts(graph: Graph, report: PassReport) -> Graph:
    """Where a graph returns columns that are put together from the ranks' parts, it returns the parts.

    The option ``vocabulary`` then says how many columns count: those that were added so that ranks could divide them
    stand behind.
    """
    output = graph.output_node()
    result = output.args[0]
    if not isinstance(result, Node) or type_of(result).rank != 2:
        return graph
    width = type_of(result).shape[-1]
    gathered = result.args[0] if op_name(result.target) == "aten.slice.Tensor" else result
    if result is not gathered and result.args[1:] != (-1, 0, width):
        return graph
    if not isinstance(gathered, Node) or op_name(gathered.target) != "dist.all_gather" or gathered.args[1:] != (1,):
        return graph
    if not report.allows(gathered.name):
        return graph
    output.replace_input_with(result, gathered.args[0])  # type: ignore[arg-type]
    graph.options[VOCABULARY] = width
    report.fused.append(gathered.name)
    return graph
