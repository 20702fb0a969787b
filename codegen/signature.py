"""What all emitted files share: parameters, pointer types, and the frame of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from .expressions import helpers_used

POINTERS = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i64": "*i64", "i32": "*i32", "bool": "*i1"}

Variant = tuple[dict[str, str], dict[str, Any], int, int]


def fresh_outputs(graph: Graph) -> list[Node]:
    """The results that the caller allocates: all but updated caches, which are written in place."""
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    return [node for node in results if op_name(node.target) != "nn.cache_write"]


def parameters(graph: Graph) -> list[str]:
    """The tensors a launcher takes: the inputs, then the results to fill."""
    return [node.name for node in graph.inputs()] + [node.name for node in fresh_outputs(graph)]


def pointer_types(graph: Graph) -> dict[str, str]:
    """Triton's types of the pointer parameters."""
    return {f"{node.name}_ptr": POINTERS[type_of(node).dtype] for node in [*graph.inputs(), *fresh_outputs(graph)]}


def file_text(
    graph: Graph, kernel_parameters: str, body: str, launch: Sequence[str], variants: Sequence[Variant]
) -> str:
    """Imports, helper functions, the kernel, its launcher, and the variants that the launcher may use."""
    parts = ["import torch\nimport triton\nimport triton.language as tl\n"]
    parts += helpers_used(body)
    parts.append(f"@triton.jit\ndef {graph.name}_kernel({kernel_parameters}):\n{body}")
    parts.append("\n".join(launch) + "\n")
    entries = []
    for signature, constants, warps, stages in variants:
        types = ", ".join(f'"{name}": "{kind}"' for name, kind in signature.items())
        values = ", ".join(f'"{name}": {value}' for name, value in constants.items())
        entries.append(
            f'    {{"kernel": {graph.name}_kernel, "signature": {{{types}}},\n'
            f'     "constexprs": {{{values}}}, "num_warps": {warps}, "num_stages": {stages}}},\n'
        )
    parts.append("# Every specialisation that launch may use.\nVARIANTS = [\n" + "".join(entries) + "]\n")
    return "\n\n".join(parts)
