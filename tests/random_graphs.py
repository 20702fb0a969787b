"""Random transformer-like graphs: a seed gives a recipe, a recipe gives a graph, and a recipe shrinks.

A recipe is a list of fragments (see ``random_fragments``) that work on a residual stream. Each fragment draws from a
generator of its own, so that a fragment stays what it is when others are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from random_builder import Builder, Choices
from random_fragments import FRAGMENTS, KINDS, embedding, head
from torch import Tensor

from fuseline.ir import Graph
from fuseline.ir.graph import type_of
from fuseline.ir.ops import op_name
from fuseline.ir.quantized import quantize
from fuseline.ir.rounded_weights import state_rounded
from fuseline.ir.schemes import scheme_of
from fuseline.passes import KV_DTYPE, QUANTIZATION, spelled


@dataclass(frozen=True)
class Recipe:
    """What a graph is made of: ``fragments`` are numbers and kinds, ``plain`` the numbers that make no choices."""

    seed: int
    fragments: tuple[tuple[int, str], ...]
    plain: frozenset[int] = frozenset()
    dtype: str = "f32"
    batched: bool = True
    width: int = 8
    block: int = 4
    tokens: int = 5
    rounded: bool = False
    cache: str = ""
    held: str = ""
    ordered: bool = False


def recipe(seed: int) -> Recipe:
    """The recipe of a seed."""
    c = Choices(f"recipe {seed}")
    count = c.of(1, 1, 1, 1, 1, 2, 2, 3)
    return Recipe(
        seed=seed,
        fragments=tuple((number, c.of(*KINDS)) for number in range(count)),
        dtype=c.of("f32", "f32", "f32", "bf16"),
        batched=c.of(True, True, False),
        width=c.of(1, 3, 5, 7, 8, 12, 12, 16, 97),
        block=c.of(1, 2, 4, 16),
        tokens=c.of(*range(1, 10)),
        rounded=c.of(True, False),
        cache=c.of("", "", "", "", "i8", "f8e4m3"),
        held=c.of("", "", "", "", "int8", "int8d"),
        ordered=c.of(True, False, False),
    )


def build(recipe: Recipe) -> Graph:
    """The graph of a recipe, from tokens and positions to logits."""
    b = Builder(recipe.dtype, recipe.batched, recipe.width, recipe.block)

    def choices(number: int) -> Choices:
        return Choices(f"{recipe.seed} {number}", number in recipe.plain)

    h = embedding(b, choices(-1))
    for number, kind in recipe.fragments:
        b.stream.append(h)
        h = FRAGMENTS[kind](b, choices(number), h)
    b.graph.output(head(b, choices(-2), h))
    if recipe.rounded:
        b.graph.options[QUANTIZATION] = spelled({"*": "int8"})
    if recipe.cache:
        b.graph.options[KV_DTYPE] = recipe.cache
    if recipe.held and not recipe.rounded:
        names = _of_projections(b.graph)
        state_rounded(b.graph, dict.fromkeys(names, recipe.held), names if recipe.ordered else ())
    return b.graph


def _of_projections(graph: Graph) -> set[str]:
    """The names of weights that only projections read."""
    found: dict[str, bool] = {}
    for node in graph.calls():
        if op_name(node.target) == "weight":
            name = str(node.args[0])
            only = all(op_name(user.target) == "aten.linear" and user.args[0] is not node for user in node.users)
            found[name] = found.get(name, True) and only and type_of(node).rank == 2
    return {name for name, only in found.items() if only}


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The smallest recipe found that still fails: fragments left out one by one, then made plain, then fewer tokens."""
    smaller = True
    while smaller:
        smaller = False
        numbers = [number for number, _ in recipe.fragments]
        attempts = [replace(recipe, fragments=tuple(f for f in recipe.fragments if f[0] != n)) for n in numbers]
        attempts += [replace(recipe, plain=recipe.plain | {n}) for n in [-2, -1, *numbers] if n not in recipe.plain]
        attempts += [replace(recipe, tokens=tokens) for tokens in range(1, recipe.tokens)]
        attempts += [replace(recipe, **{name: value}) for name, value in _SIMPLE if getattr(recipe, name) != value]
        for attempt in attempts:
            if fails(attempt):
                recipe, smaller = attempt, True
                break
    return recipe


_SIMPLE: tuple[tuple[str, Any], ...] = (
    ("dtype", "f32"),
    ("batched", False),
    ("rounded", False),
    ("ordered", False),
    ("held", ""),
)


def draw_weights(graph: Graph, seed: int) -> dict[str, Tensor]:
    """Weights in fp32 that keep values near 1: matrices shrink with the width they sum over."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for node in graph.calls():
        if op_name(node.target) == "weight" and str(node.args[0]) not in weights:
            kind, shape = type_of(node), type_of(node).concrete({})
            if kind.dtype == "i64":
                weights[str(node.args[0])] = torch.randperm(shape[0], generator=generator)
                continue
            drawn = torch.randn(shape, generator=generator)
            drawn = drawn if len(shape) < 2 else drawn * shape[-1] ** -0.5
            scheme = scheme_of(kind.dtype)
            weights[str(node.args[0])] = quantize(drawn, scheme) if scheme else drawn
    return weights
