"""Ranks that ``compile`` starts itself: the tokens of one process, and an end for all when one ends."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from families import make
from transformers import LlamaConfig, LlamaForCausalLM

import fuseline
from fuseline.runtime import started
from fuseline.runtime.sequence import SamplingParams
from fuseline.runtime.told import line_of, value_of

PROMPTS = [[1, 2, 3], [4, 5], [7] * 20]


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started, which are at an end when the test is."""
    made: list[Any] = []
    start = started.Team.__init__

    def keep(self: started.Team, *arguments: Any) -> None:
        start(self, *arguments)
        made.extend(process for _, process, _ in self._processes)

    monkeypatch.setattr(started.Team, "__init__", keep)
    return made


def test_ranks_that_are_started_serve_like_one_process_until_one_is_killed(teams: list[Any]) -> None:
    model = make("llama")
    alone = fuseline.compile(model, device="cpu", max_seq_len=64)
    ours = fuseline.compile(model, device="cpu", max_seq_len=64, tensor_parallel=2)
    greedy: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": []}
    drawn = {**greedy, "temperature": 1.0, "seed": 3}
    assert ours.generate(PROMPTS, **greedy) == alone.generate(PROMPTS, **greedy)
    assert ours.generate(PROMPTS, **drawn) == alone.generate(PROMPTS, **drawn)
    assert [len(answer) for answer in ours.generate(PROMPTS, temperature=2.0, **greedy)] == [8] * 3
    torch.testing.assert_close(ours(PROMPTS).logits, alone(PROMPTS).logits, atol=1e-4, rtol=1e-4)
    assert ours.decode_step_ms(2, 20, 3) > 0
    first = ours.engine.add([5, 6, 7])
    ours.engine.add([8, 9])
    ours.engine.step()
    assert ours.engine.abort(first)
    with pytest.raises(fuseline.InvalidRequestError, match="max_seq_len is 64"):
        ours.engine.add([1] * 65)
    ours.engine.run()
    assert ours.generate(PROMPTS, **greedy) == alone.generate(PROMPTS, **greedy), "and still after that"
    (other,) = teams
    begin = time.monotonic()
    os.kill(other.pid, signal.SIGKILL)
    with pytest.raises(fuseline.RankError, match=r"rank 1 of 2 has ended \(-9\)"):
        ours.generate(PROMPTS, **greedy)
    assert time.monotonic() - begin < 10
    ours.close()
    with pytest.raises(fuseline.RankError, match="compile the model again"):
        ours.generate(PROMPTS, **greedy)
    assert not distributed.is_initialized()


def test_ranks_end_with_the_model_and_with_a_compile_that_fails(teams: list[Any]) -> None:
    model = make("llama")
    with pytest.raises(fuseline.UnsupportedModelError, match="fits the name of no projection"):
        fuseline.compile(model, device="cpu", max_seq_len=64, tensor_parallel=2, replicated=["*.nothing"])
    assert [process.poll() is not None for process in teams] == [True]
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    deep = LlamaForCausalLM(LlamaConfig(vocab_size=96, initializer_range=0.2, **sizes)).eval()
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64}
    ours = fuseline.compile(deep, tensor_parallel=2, **options)
    greedy: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": []}
    assert ours.generate(PROMPTS, **greedy) == fuseline.compile(deep, **options).generate(PROMPTS, **greedy)
    assert teams[1].poll() is None
    del ours
    gc.collect()
    assert teams[1].poll() == 0
    assert not distributed.is_initialized()


def test_what_cannot_be_told_to_other_processes_is_refused(teams: list[Any]) -> None:
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(fuseline.OptionError, match="mpirun or torchrun"):
        fuseline.compile(model, device="cpu", tensor_parallel=2, weights={"here alone": torch.zeros(1)})
    assert teams == []


def test_a_model_whose_checkpoint_is_another_is_refused(teams: list[Any]) -> None:
    rounded = make("gemma3_text", torch.bfloat16)  # and its rotary frequencies with it, which no checkpoint holds
    with pytest.raises(
        fuseline.OptionError, match="inv_freq of this Gemma3ForCausalLM is not what its checkpoint gives"
    ):
        fuseline.compile(rounded, device="cpu", tensor_parallel=2)
    assert teams == []


def test_what_is_told_is_what_is_heard() -> None:
    said = {
        "kv_cache": fuseline.KVCacheConfig(16, 64, dtype=torch.float16),
        "calibration": fuseline.Calibration(windows=3),
        "params": SamplingParams(7, 0.5, None, 0.9, 2**63 + 1, (5, 6)),
        "dtype": torch.bfloat16,
        "skip": ["FuseRope", 3],
        "quantization": {"*.down_proj": "int8", "*": None},
    }
    assert value_of(line_of(said)) == said
    assert value_of(line_of(Path("a/b"))) == "a/b"
    with pytest.raises(TypeError, match="a set is neither"):
        line_of({1})
