"""Keys and values in 8 bits: each head of each token is rounded by itself, with a factor of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .graph import Graph, type_of
from .ops import op_name, register
from .types import DTYPES

LARGEST = {"i8": 127.0, "f8e4m3": 448.0}
"""The element types that a cache may be rounded to, each with its largest number."""
TRIES = {"i8": 1, "f8e4m3": 4}
"""Factors that are tried for a row: E4M3 is as exact with any, but not for the same numbers."""


@register("nn.head_factors")
def head_factors(x: Tensor, dtype: str) -> Tensor:
    """What one code stands for in each row of ``x [T, heads, D]``: ``bf16 [T, heads, 1]``.

    That is the row's largest magnitude over the largest code of ``dtype`` (``"i8"`` or ``"f8e4m3"``), in fp32 and then
    in bf16; 1 for a row of zeros. For E4M3 it is the first of that times 1, 5/4, 3/2 and 7/4 whose numbers have the least
    squared distance from the row.
    """
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True)
    smallest = torch.where(most > 0, most / most.new_tensor(LARGEST[dtype]), 1.0)
    best, least = smallest.bfloat16(), torch.full_like(smallest, torch.inf)
    if wide.device.type == "meta" or TRIES[dtype] == 1:
        return best
    for number in range(TRIES[dtype]):
        factors = (smallest * (1 + number / TRIES[dtype])).bfloat16()
        distance = (
            (numbers(head_codes(wide, factors, dtype), factors, wide.dtype) - wide).square().sum(-1, keepdim=True)
        )
        best = torch.where(distance < least, factors, best)
        least = torch.minimum(distance, least)
    return best


@register("nn.head_codes")
def head_codes(x: Tensor, factors: Tensor, dtype: str) -> Tensor:
    """``x [T, heads, D]`` over its factors ``[T, heads, 1]``, rounded to the nearest code (ties to even)."""
    largest = LARGEST[dtype]
    scaled = (x.float() / factors.float()).clamp(-largest, largest)
    return (torch.round(scaled) if dtype == "i8" else scaled).to(DTYPES[dtype])


def numbers(codes: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes ``[..., D]`` and factors ``[..., 1]`` stand for; without factors they are numbers already."""
    return codes.to(dtype) if factors is None else (codes.float() * factors.float()).to(dtype)


def rounds_cache(graph: Graph) -> bool:
    """Whether keys and values become codes in each step."""
    return any(op_name(node.target) == "nn.head_codes" for node in graph.calls())


def without_cache_rounding(graph: Graph) -> Graph:
    """A copy of a graph whose caches hold what it computes, where it would hold codes and factors."""
    plain = graph.copy()
    for node in list(plain.calls()):
        name = op_name(node.target)
        if name == "nn.head_codes":
            source = node.args[0]
            assert isinstance(source, Node)
            for written in node.users:
                cache = written.args[0]
                assert isinstance(cache, Node)
                for item in (cache, written):
                    item.meta["type"] = type_of(item).with_dtype(type_of(source).dtype)
            node.replace_all_uses_with(source)
        elif name == "nn.paged_attention":
            node.args = node.args[:12]
        elif name == "nn.cache_write" and op_name(node.all_input_nodes[1].target) == "nn.head_factors":
            node.replace_all_uses_with(node.all_input_nodes[0])
            plain.erase_node(node)
    plain.eliminate_dead()
    return plain
