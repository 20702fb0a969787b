"""Decode steps padded to a few sizes, fed on the device, launched ahead: the same tokens as one by one.

On the CPU the padded steps are plain calls; ``test_gpu_graphs.py`` has them as CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import make

import fuseline
from fuseline.runtime import parts
from fuseline.runtime.buckets import bucket_for, decode_buckets
from fuseline.runtime.sequence import SamplingParams, Sequence
from fuseline.runtime.static_step import StaticStep
from fuseline.runtime.tables import BlockTables, table_width

LENGTHS = (1, 7, 16, 33, 48, 2, 20)
NEW = 12


def prompts(vocab: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, vocab, (LENGTHS[index % len(LENGTHS)],), generator=generator).tolist()
        for index in range(count)
    ]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows read NaN from the scratch block, and every other input of them is arbitrary but in range."""
    stores: list[torch.Tensor] = []
    new_caches, pad = parts.new_caches, StaticStep.pad

    def keep(*args: Any) -> Any:
        caches = new_caches(*args)
        stores[:] = caches.values()
        return caches

    def spoil(self: StaticStep, staged: Any, count: int, size: int) -> None:
        pad(self, staged, count, size)
        for store in stores:
            store[self.scratch_block * self.block_size :] = torch.nan
        rows = slice(count, size)
        staged.known[rows] = np.arange(count, size) % 7
        staged.positions[rows] = np.arange(count, size) % 5
        staged.contexts[rows] = self.block_size

    monkeypatch.setattr(parts, "new_caches", keep)
    monkeypatch.setattr(StaticStep, "pad", spoil)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 63, 64, 65, 100, 256, 257, 300, 1000])
def test_buckets_hold_every_batch_and_end_with_the_largest(most: int) -> None:
    sizes = decode_buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        size = bucket_for(sizes, count)
        assert size >= count and all(other < count or other >= size for other in sizes)
    assert decode_buckets(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_padded_steps_give_the_same_tokens(name: str, lookahead: bool, poisoned: None) -> None:
    """Batches around the sizes, the largest no usual size; greedy and sampled; what padding holds is NaN."""
    model = make(name)
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 80, "max_batch_size": 11, "dtype": torch.float32}
    plain = fuseline.compile(model, **options)
    padded = fuseline.compile(model, **options, graphs=True, lookahead=lookahead)
    assert padded.report.graphs == "decode in 5 sizes up to 11, as plain calls"
    given = prompts(model.config.get_text_config().vocab_size, 11)
    for count in (1, 3, 4, 5, 8, 11):
        for temperature in (0.0, 0.8):
            wanted = plain.generate(given[:count], max_new_tokens=NEW, temperature=temperature, seed=4)
            assert padded.generate(given[:count], max_new_tokens=NEW, temperature=temperature, seed=4) == wanted
    padded.engine.check_integrity()
    assert padded.engine.pool.num_free == padded.engine.pool.num_blocks


def test_block_tables_follow_their_sequences() -> None:
    """Rows grow with the sequence, are written anew after a preemption, and pass to others when it is gone."""
    tables = BlockTables(2, table_width(64, 4))
    first, second, third = (Sequence(index, [1], SamplingParams(), block_table=[]) for index in range(3))
    first.block_table, second.block_table, third.block_table = [5, 3], [7], [8, 1, 2]
    places = tables.places([first, second])
    assert tables.rows[places, :2].tolist() == [[5, 3], [7, 0]]
    changes = tables.changes
    assert tables.places([second, first]).tolist() == places[::-1].tolist()
    assert tables.changes == changes
    second.block_table.append(9)
    assert tables.rows[tables.places([second])[0], :2].tolist() == [7, 9]
    assert tables.changes == changes + 1
    first.block_table = [4, 6]
    first.admissions += 1
    assert tables.rows[tables.places([first])[0], :2].tolist() == [4, 6]
    assert tables.places([first, third]).tolist() == places.tolist()
    assert tables.rows[places[1], :3].tolist() == [8, 1, 2]
