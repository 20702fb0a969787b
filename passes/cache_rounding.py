"""QuantizeCache: keys and values are held in 8 bits, with a factor for each head of each token."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir import nn
from ..ir.attention import cache_write
from ..ir.build import insert_before
from ..ir.cache_rounding import head_codes, head_factors
from ..ir.graph import Graph, type_of
from ..ir.infer import infer
from ..ir.ops import op_name
from ..ir.types import TensorType
from .ledger import PassReport, asks_first

OPTION = "kv_dtype"
# Arguments of ``nn.paged_attention`` after the caches: so many that must be given, and those that need not.
_REQUIRED = 5
_DEFAULTS = {"kind": "causal", "window": 0, "softcap": 0.0, "sinks": None}


@asks_first
def quantize_cache(graph: Graph, report: PassReport) -> Graph:
    """Round what is written to the caches as the graph's option says; attention takes the factors along."""
    dtype = graph.options.get(OPTION)
    if dtype is None:
        return graph
    for node in list(graph.calls()):
        if op_name(node.target) != "nn.paged_attention" or len(node.args) > 12 or not report.allows(node.name):
            continue
        q, k, v, *rest = node.args
        assert isinstance(k, Node) and isinstance(v, Node)
        codes, factors = zip(*(_rounded(graph, written, str(dtype)) for written in (k, v)))
        # What is left out has its default; the factors stand behind all of it.
        left_out: list[Any] = [
            node.kwargs.get(name, value) for name, value in list(_DEFAULTS.items())[len(rest) - _REQUIRED :]
        ]
        node.args = (q, *codes, *rest, *left_out, *factors)
        node.kwargs = {}
        report.fused.append(node.name)
    return graph


def _rounded(graph: Graph, written: Node, dtype: str) -> tuple[Node, Node]:
    """The codes and the factors written instead of numbers, as values of caches."""
    cache, rows, slots = written.args
    assert isinstance(cache, Node) and isinstance(rows, Node)
    role, layer = cache.args
    kind = type_of(cache)
    cache.meta["type"] = kind.with_dtype(dtype)
    with graph.inserting_after(cache):
        store = graph.create_node("call_function", nn.cache, (f"{role}_factors", layer), name=f"{role}_factors_{layer}")
    store.meta["type"] = TensorType("bf16", (*kind.shape[:-1], 1))

    def before(target: object, args: tuple[object, ...], name: str) -> Node:
        return insert_before(graph, written, target, args, name=f"l{layer}_{role}_{name}", source="QuantizeCache")

    found = before(head_factors, (rows, dtype), "factors")
    codes = before(head_codes, (rows, found, dtype), "codes")
    factors = before(cache_write, (store, found, slots), "factors_written")
    written.args = (cache, codes, slots)
    written.meta["type"] = infer(written.target, written.args, {})
    return written, factors
