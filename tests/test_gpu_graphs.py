"""On a GPU, decode steps as CUDA graphs, launched ahead: the same tokens, no wait for the host, memory as planned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from transformers import LlamaConfig, LlamaForCausalLM

import fuseline
from fuseline.runtime import parts
from fuseline.runtime.engine import Engine
from fuseline.runtime.replay import GraphReplay, NotCapturable
from fuseline.runtime.sequence import SamplingParams
from fuseline.runtime.static_step import StaticStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = ("llama", "gpt2", "gemma2", "gemma3_text", "mixtral", "gpt_oss")
LENGTHS = (1, 7, 16, 33, 48, 2, 20)
BATCH = 11
NEW = 12


def prompts(vocab: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, vocab, (LENGTHS[index % len(LENGTHS)],), generator=generator).tolist()
        for index in range(count)
    ]


def engine_of(compiled: fuseline.CompiledModel, blocks: int | None = None, **changes: Any) -> Engine:
    """Another engine on the same weights and cache: by default without graphs and without looking ahead."""
    options, pool = compiled.options, compiled.engine.pool
    return Engine(
        compiled.engine._runner.model,
        num_blocks=blocks or pool.num_blocks,
        block_size=pool.block_size,
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        max_step_tokens=options.max_step_tokens,
        vocabulary=compiled.engine.vocabulary,
        device=options.device,
        **changes,
    )


def answers(engine: Engine, given: list[list[int]], sampled: str, new: int = NEW) -> list[list[int]]:
    """New tokens of each prompt: greedy, drawn, or both in one batch."""
    ids = []
    for number, prompt in enumerate(given):
        draws = sampled == "all" or (sampled == "some" and number % 2 == 1)
        cut = {"top_k": 5} if number % 4 == 1 else {"top_p": 0.9} if number % 4 == 3 else {}
        ids.append(
            engine.add(
                prompt, SamplingParams(new + number % 3, 0.8, seed=number, **cut) if draws else SamplingParams(new)
            )
        )
    done = engine.run()
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks
    return [done[number].output for number in ids]


@pytest.fixture(scope="class")
def poison() -> Iterator[None]:
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

    patch = pytest.MonkeyPatch()
    patch.setattr(parts, "new_caches", keep)
    patch.setattr(StaticStep, "pad", spoil)
    yield
    patch.undo()


class TestTokens:
    """In fp32, with padding that holds NaN."""

    @pytest.fixture(scope="class", params=FAMILIES)
    def compiled(self, request: pytest.FixtureRequest, poison: None) -> fuseline.CompiledModel:
        return fuseline.compile(
            make(request.param).cuda(),
            device="cuda",
            dtype=torch.float32,
            max_seq_len=80,
            max_batch_size=BATCH,
            tuning=False,
        )

    def test_they_are_those_without_graphs(self, compiled: fuseline.CompiledModel) -> None:
        """For batches around the sizes, greedy and drawn; then in a cache so small that blocks are taken away."""
        assert compiled.report.graphs == "decode in 5 sizes up to 11"
        plain = engine_of(compiled)
        given = prompts(compiled.engine.vocabulary.size, BATCH + 3)
        for count in (1, 2, 3, 4, 5, 8, 9, BATCH, BATCH + 3):
            for sampled in ("none", "some", "all"):
                wanted = answers(plain, given[:count], sampled)
                assert answers(compiled.engine, given[:count], sampled) == wanted, (count, sampled)
        tight = engine_of(compiled, blocks=9, decode=compiled._decode, lookahead=True)
        assert answers(tight, given, "some", 30) == answers(plain, given, "some", 30)
        assert tight.stats.preemptions > 0

    def test_late_stops_and_aborts(self, compiled: fuseline.CompiledModel) -> None:
        """A stop token is known one step late: what was launched meanwhile changes nothing for the others."""
        plain, given = engine_of(compiled), prompts(compiled.engine.vocabulary.size, 6)
        free = answers(plain, given, "none")
        stops = (free[0][3], free[2][5], free[3][0])

        def run(engine: Engine) -> list[tuple[int, int, str]]:
            first = engine.add(given[0], SamplingParams(NEW, stop_token_ids=stops))
            for prompt in given[1:]:
                engine.add(prompt, SamplingParams(NEW, stop_token_ids=stops))
            victim = engine.add([*given[0], 1, 2], SamplingParams(NEW))
            events = [event for _ in range(4) for event in engine.step()]
            engine.abort(victim)
            engine.run(events.append)
            assert engine.pool.num_free == engine.pool.num_blocks
            found = [(event.sequence_id - first, event.token, event.finish_reason or "") for event in events]
            return sorted(found, key=lambda item: item[0])

        assert run(compiled.engine) == run(plain)


def midsize() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def large() -> fuseline.CompiledModel:
    return fuseline.compile(midsize(), device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_no_step_waits_for_the_host(large: fuseline.CompiledModel, batch: int) -> None:
    """Wall time of a token through ``generate``, without the prefill, next to a replay of the graph alone."""
    given = [[7] * 128] * batch

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        large.generate(given, max_new_tokens=new, stop_token_ids=[])
        return time.perf_counter() - begin

    seconds(8)
    wall = min(1e3 * (seconds(264) - seconds(8)) / 256 for _ in range(3))
    replay = large.decode_step_ms(batch, 256)
    print(f"\nbatch {batch}: {wall:.3f} ms a token, replay {replay:.3f} ms, ratio {wall / replay:.3f}")
    assert wall < 1.5 * replay


def test_memory_is_as_planned(large: fuseline.CompiledModel) -> None:
    report = large.report
    print(f"\nplanned {report.planned_bytes / 1e9:.3f} GB, measured {(report.measured_bytes or 0) / 1e9:.3f} GB")
    assert report.measured_bytes is not None
    assert abs(report.planned_bytes - report.measured_bytes) <= 0.05 * report.planned_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    large.generate([[5] * 300] * 64, max_new_tokens=20, temperature=0.7, top_p=0.9, stop_token_ids=[])
    # Serving takes no more than the rehearsal did.
    assert torch.cuda.max_memory_allocated() - before <= report.workspace_bytes


def test_the_cache_takes_its_share() -> None:
    """All that torch holds, with what was in use before, stays within the share of the device's memory."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.06
    compiled = fuseline.compile(
        midsize(), device="cuda", max_batch_size=256, kv_cache=fuseline.KVCacheConfig(memory_share=share)
    )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert share - 0.02 <= (total - free) / total <= share + 0.01
    assert compiled.report.cache_bytes > 0


@pytest.mark.parametrize("when", ["always", "while it is recorded"])
def test_what_cannot_be_recorded_leaves_nothing_behind(when: str) -> None:
    """The error names the cause, and the device serves on: eager work, and recordings of others."""
    counter = torch.zeros(4, device="cuda")

    def waits(size: int) -> None:
        counter.add_(1)
        if when == "always" or torch.cuda.is_current_stream_capturing():
            try:
                counter[0].item()
            except RuntimeError as error:
                error.add_note("in aten.item")
                raise

    stream = torch.cuda.current_stream()
    with pytest.raises(NotCapturable, match="aten.item"):
        GraphReplay(waits, [1, 2], torch.device("cuda", 0))
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.synchronize()
    before = float(counter[0])

    def counts(size: int) -> None:
        counter.add_(size)

    replay = GraphReplay(counts, [1, 2], torch.device("cuda", 0))
    started = float(counter[0])
    replay(1)
    replay(2)
    assert float(counter[0]) == started + 3
    assert started > before
