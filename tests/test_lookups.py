"""Tokens are looked up in a table of which each rank has some rows: the rows of one process, and memory for a part."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from tensor_parallel import on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

import fuseline
from fuseline import ir, passes
from fuseline.codegen.kernels import kernel_file
from fuseline.codegen.offline import load_kernel_file
from fuseline.ir.interpret import interpret
from fuseline.ir.nn import lookup

PROMPTS = [[1, 2, 3], [0, 98, 50, 49], [7] * 20]
OPTIONS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64}
_TEXT = """\
def f(tokens: i64[T], positions: i64[T], *, T: dim(1, 64), OPTIONS):
    table: f32[7, 4] = weight("embed.weight")
    rows: f32[T, 4] = aten.embedding(table, tokens)
    scaled: f32[T, 4] = aten.mul.Tensor(rows, 2.0)
    places: f32[64, 4] = weight("places.weight")
    at: f32[T, 4] = aten.embedding(places, positions)
    total: f32[T, 4] = aten.add.Tensor(scaled, at)
    return total
"""


def sharded(options: str, ranks: int) -> tuple[ir.Graph, passes.PassReport]:
    graph = ir.parse(_TEXT.replace("OPTIONS", f"tensor_parallel: option({ranks}){options}"))
    (step,) = passes.steps(graph, ["Shard"], check=True)
    return step.graph, step.report


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_give_the_rows_that_they_have(ranks: int) -> None:
    graph, report = sharded("", ranks)
    text = ir.dump(graph)
    assert f"table_part: f32[{-(-7 // ranks) * ranks}, 4] @ shard(0)" in text
    assert "rows: f32[T, 4] @ partial = nn.lookup(table_part, tokens_routed)" in text
    assert "rows_reduced: f32[T, 4] = dist.all_reduce(rows)" in text
    assert "at: f32[T, 4] = aten.embedding(places, positions)" in text, "every rank has the few positions"
    assert report.fused == ["rows"]
    ir.verify(ir.parse(text))
    with pytest.raises(fuseline.VerificationError, match="tokens must be routed there: rows has some of the rows"):
        ir.verify(ir.parse(text.replace("tokens_routed)", "tokens)")))
    inputs = {"tokens": torch.tensor([0, 6, 3, 3, 1, 5, 2, 4]), "positions": torch.arange(8)}
    weights = {"embed.weight": torch.randn(7, 4), "places.weight": torch.randn(64, 4)}
    (wanted,) = interpret(ir.parse(_TEXT.replace("OPTIONS", "tensor_parallel: option(1)")), inputs, weights)
    assert torch.equal(interpret(graph, inputs, weights)[0], wanted)
    for (found,) in on_ranks(passes.run(ir.parse(text), ["Localize"]), ranks, inputs, weights):
        assert torch.equal(found, wanted)


def test_a_table_that_is_not_to_be_cut_is_whole() -> None:
    graph, report = sharded(', replicated: option("embed*")', 2)
    assert "nn.lookup" not in ir.dump(graph)
    assert [(item.site, item.why) for item in report.refused] == [
        ("rows", "every rank computes it whole: 'embed*' is not to be cut")
    ]
    with pytest.raises(fuseline.UnsupportedModelError, match="'places.' fits the name of no projection's weight, nor"):
        sharded(', replicated: option("places*")', 2)


def test_ids_without_a_row_give_zeros() -> None:
    table = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [5.0, 6.0]])
    ids = torch.tensor([-3, -1, 0, 2, 3, 9])
    assert lookup(table, ids).tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]


_REGION = """\
def embed(table: {kind}[33, 20], ids: i64[T], *, T: dim(1, 64)):
    rows: {kind}[T, 20] = nn.lookup(table, ids)
    scaled: {kind}[T, 20] = aten.mul.Tensor(rows, 3.0)
    return [rows, scaled]
"""


def looked_up(path: str, kind: str) -> bool:
    """Whether a kernel finds rows and zeros; on the CPU only where Triton interprets."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    # What lies around the table in memory must not be read: it is no number.
    memory = torch.full((99, 20), torch.nan, dtype=dtype)
    memory[33:66] = torch.randn(33, 20).to(dtype)
    table, ids = memory[33:66], torch.tensor([-33, -1, 0, 32, 33, 65, 7, 2**40, -(2**40)])
    rows, scaled = (torch.full((len(ids), 20), torch.nan, dtype=dtype) for _ in range(2))
    load_kernel_file(path).launch(table, ids, rows, scaled)
    wanted = lookup(table, ids)
    # The interpreter rounds to bf16 towards zero.
    near = torch.allclose(scaled.float(), wanted.float() * 3, rtol=1e-2 if kind == "bf16" else 1e-6)
    return torch.equal(rows, wanted) and near


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_kernel_reads_no_row_that_is_not_there(kind: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "embed.py"
    path.write_text(kernel_file(ir.parse(_REGION.format(kind=kind))))
    assert pool.submit(looked_up, str(path), kind).result(timeout=120)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("vocabulary", "ranks"), [(96, 2), (99, 2), (99, 4)])
def test_a_rank_holds_its_part_of_the_table(tied: bool, vocabulary: int, ranks: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, tie_word_embeddings=tied, **sizes)
    model = LlamaForCausalLM(config).eval()
    greedy: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": []}
    prompts = [[token % vocabulary for token in prompt] for prompt in PROMPTS]
    wanted = fuseline.compile(model, **OPTIONS).generate(prompts, **greedy)
    ours = fuseline.compile(model, tensor_parallel=ranks, simulate=True, **OPTIONS)
    assert ours.generate(prompts, **greedy) == wanted
    table = "lm_head*" if tied else "*embed_tokens*"  # a tied weight has one name
    whole = fuseline.compile(model, tensor_parallel=ranks, simulate=True, replicated=[table], **OPTIONS)
    assert whole.generate(prompts, **greedy) == wanted
    if not tied:
        saved = vocabulary - -(-vocabulary // ranks)
        assert whole.report.weight_bytes - ours.report.weight_bytes == saved * 64 * 4


def test_families_with_more_than_one_table_of_tokens_and_positions() -> None:
    model = make("gpt2")
    compiled = fuseline.compile(model, tensor_parallel=2, simulate=True, **OPTIONS)
    text = str(compiled.graph)
    assert text.count("nn.lookup(") == 1 and text.count("aten.embedding(") == 1
