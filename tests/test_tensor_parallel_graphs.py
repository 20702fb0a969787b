"""Random graphs cut for several ranks: the ranks together compute what one does, and every placement is that of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_fragments import VOCABULARY
from random_graphs import build, draw_weights, recipe
from tensor_parallel import on_ranks

from fuseline import ir, passes
from fuseline.ir.graph import type_of
from fuseline.ir.interpret import interpret
from fuseline.ir.ops import is_collective, op_name

_BEFORE = passes.PASSES.pipeline[: passes.PASSES.pipeline.index("Shard")]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_compute_what_one_does(ranks: int) -> None:
    """A wrong rule, a wrong cut or a sum that is missing would show in the numbers of some graph."""
    cut = summed = 0
    for seed in range(ranks * 1000, ranks * 1000 + 60):
        made = replace(recipe(seed), dtype="f32", width=(8, 12, 24)[seed % 3], cache="")
        graph = build(made)
        graph.options[passes.TENSOR_PARALLEL] = ranks
        whole = passes.run(graph, _BEFORE)
        (shard,) = passes.steps(whole, ["Shard"], check=True)
        text = ir.dump(shard.graph)
        assert ir.dump(passes.run(ir.parse(ir.dump(whole)), ["Shard"])) == text, f"seed {seed}"
        (local,) = passes.steps(shard.graph, ["Localize"], check=True)
        assert ir.dump(passes.run(ir.parse(text), ["Localize"])) == ir.dump(local.graph), f"seed {seed}"
        stumbled = [item.why for item in (*shard.report.refused, *local.report.refused) if item.site == "graph"]
        assert not stumbled, f"seed {seed}: {stumbled}"
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, VOCABULARY, (made.tokens,), generator=generator)
        given = zip(whole.inputs(), (tokens, torch.arange(made.tokens)), strict=True)
        inputs = {node.name: value.reshape(type_of(node).concrete({"T": made.tokens})) for node, value in given}
        weights = draw_weights(graph, seed)
        expected = interpret(whole, inputs, weights)
        annotated = interpret(shard.graph, inputs, weights)
        for found in (annotated, *on_ranks(local.graph, ranks, inputs, weights)):
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), f"seed {seed}"
        names = [op_name(node.target) for node in local.graph.calls() if is_collective(node.target)]
        cut += any(name.startswith("dist.shard") for name in names)
        summed += "dist.all_reduce" in names
    assert min(cut, summed) > 4, (cut, summed)
