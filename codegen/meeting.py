"""Kernels of rows in which ranks meet: a few rows are added up in the kernel itself, many by the ranks' library before it."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph
from ..ir.ops import resolve
from .exchange import meeting_of
from .parts import part
from .rank_rows import waits_itself
from .rows import rows_kernel
from .signature import file_text, parameters


def meeting_source(graph: Graph, meeting: Node) -> str:
    """The file of such a kernel, without its header: ``launch(*inputs, *results, ranks)`` takes an ``Exchange``, too.

    It may write over what is added up. What has been sent is waited for; more rows than are sent are sent from here.
    """
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    source = meeting.all_input_nodes[0].name
    ways = [(graph, "receive")] if waits_itself(meeting) else []
    ways.append((_that_sends(graph), "meet"))
    made = [(way.name, *rows_kernel(way, function)) for way, function in ways]
    body = []
    for way, function in ways:
        body += [f"if {function}({', '.join(parameters(way))}, ranks):", "    return"]
    total = f"ranks.all_reduce({source})"
    body.append(f"{meeting.name}.copy_({total})" if meeting in results else f"{meeting.name} = {total}")
    rest = [node for node in graph.calls() if node is not meeting]
    if rest:
        after = part(graph, rest, [node for node in results if node is not meeting], f"{graph.name}_after")
        made.append((after.name, *rows_kernel(after, "finish")))
        body.append(f"finish({', '.join(parameters(after))})")
    launch = "\n    ".join([f"def launch({', '.join(parameters(graph))}, ranks):", *body])
    variants = ", ".join(name.upper() for name, _, _ in made)
    tail = f"# Every specialisation that launch may use.\nVARIANTS = [{variants}]\n"
    return file_text([kernel for _, kernel, _ in made], *(host for _, _, host in made), f"{launch}\n\n\n{tail}")


def _that_sends(graph: Graph) -> Graph:
    """The region in which a rank sends its rows itself."""
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    if not waits_itself(meeting_of(graph)):
        return graph
    made = part(graph, graph.calls(), results, f"{graph.name}_meeting")
    found = meeting_of(made)
    assert found is not None
    found.target = resolve("dist.all_reduce")
    return made
