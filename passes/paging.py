"""PageAttention: attention over one sequence becomes attention of many sequences over a paged KV cache."""

from __future__ import annotations

from torch.fx import Node

from ..ir import nn
from ..ir.attention import cache_write, paged_attention
from ..ir.build import insert_before
from ..ir.graph import Graph, type_of
from ..ir.ops import aten, op_name
from ..ir.types import Dim, Size, TensorType
from .ledger import PassReport

# Sequences, blocks of the longest block table, slots of the KV pool; the pool may have any size.
_DIMS = {"S": (1, 8192), "B": (1, 1 << 20), "C": (1, 1 << 40)}


def page_attention(graph: Graph, report: PassReport) -> Graph:
    """Give the graph block tables, and every attention layer a cache to write its keys and values to and read from."""
    layers = [node for node in graph.calls() if op_name(node.target) == "nn.attention"]
    if not layers:
        return graph
    block_size = graph.options.get("kv_block", 16)
    graph.dims.update(_DIMS)
    s, b, c, t = (Dim.named(name) for name in "SBCT")
    slots = graph.add_input("slots", TensorType("i64", (t,)))
    tables = graph.add_input("block_tables", TensorType("i32", (s, b)))
    starts = graph.add_input("query_starts", TensorType("i32", (Dim((("S", 1),), 1),)))
    lengths = graph.add_input("context_lens", TensorType("i32", (s,)))
    for node in layers:
        q, k, v, layer, *rest = node.args
        assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
        q, k, v = (_as_rows(graph, node, item) for item in (q, k, v))
        written = []
        for role, rows in (("k", k), ("v", v)):
            heads, width = type_of(rows).shape[-2:]
            with graph.inserting_before(node):
                store = graph.create_node("call_function", nn.cache, (role, layer), name=f"{role}_cache_{layer}")
            store.meta["type"] = TensorType(type_of(rows).dtype, (c, heads, width))
            name = f"l{layer}_{role}_written"
            written.append(
                insert_before(graph, node, cache_write, (store, rows, slots), name=name, source="PageAttention")
            )
        args = (q, *written, tables, starts, lengths, block_size, *rest)
        paged = insert_before(graph, node, paged_attention, args, node.kwargs)
        line = node.meta.get("source", "")
        paged.meta["source"] = f"PageAttention; {line}" if line else "PageAttention"
        back = _reshaped(graph, node, paged, list(type_of(node).shape))
        node.replace_all_uses_with(back)
        name = node.name
        graph.erase_node(node)
        paged.name = name
        report.fused.append(name)
    return graph


def _as_rows(graph: Graph, node: Node, value: Node) -> Node:
    """The value as ``[T, heads, head_dim]``, without leading dims of 1."""
    return _reshaped(graph, node, value, list(type_of(value).shape[-3:]))


def _reshaped(graph: Graph, node: Node, value: Node, shape: list[Size]) -> Node:
    if list(type_of(value).shape) == shape:
        return value
    return insert_before(graph, node, aten("reshape"), (value, shape))
