"""Kernels of rows in which ranks meet: few rows are added up in the kernel itself, many by the ranks' library before it."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph
from .parts import part
from .rows import rows_kernel
from .signature import file_text, parameters


def meeting_source(graph: Graph, meeting: Node) -> str:
    """The file of such a kernel, without its header: ``launch(*inputs, *results, ranks)`` takes an ``Exchange``, too.

    It may write over what is added up.
    """
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    source, names = meeting.all_input_nodes[0].name, parameters(graph)
    kernel, meet = rows_kernel(graph, "meet")
    kernels, hosts, variants = [kernel], [meet], [graph.name.upper()]
    lines = [f"{meeting.name} = ranks.all_reduce({source})"]
    if meeting in results:
        lines = [f"{meeting.name}.copy_(ranks.all_reduce({source}))"]
    rest = [node for node in graph.calls() if node is not meeting]
    if rest:
        after = part(graph, rest, [node for node in results if node is not meeting], f"{graph.name}_after")
        kernel, host = rows_kernel(after, "finish")
        kernels, hosts = [*kernels, kernel], [*hosts, host]
        variants.append(after.name.upper())
        lines.append(f"finish({', '.join(parameters(after))})")
    body = "\n".join(f"        {line}" for line in lines)
    launch = f"def launch({', '.join(names)}, ranks):\n    if not meet({', '.join(names)}, ranks):\n{body}\n"
    tail = f"# Every specialisation that launch may use.\nVARIANTS = [{', '.join(variants)}]\n"
    return file_text(kernels, *hosts, f"{launch}\n\n{tail}")
