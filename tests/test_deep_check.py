"""The self-check of a deep model covers every layer's weights and every distinct layer, though few layers run often.

If this fails, a model whose layers got wrong weights, or whose layers mix tokens, is served as if it were right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep import make_deep
from test_ledger import OPTIONS as SIZES

import fuseline
from fuseline.ir.loop import Loop
from fuseline.ir.period import Period
from fuseline.ir.skeleton import skeleton
from fuseline.runtime.caches import new_caches
from fuseline.runtime.constants import fold_constants
from fuseline.runtime.executor import Executor
from fuseline.runtime.lower import Wishes, lower
from fuseline.runtime.report import Report
from fuseline.runtime.selfcheck import check_concatenation, most_slots

OPTIONS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "kv_cache": fuseline.KVCacheConfig(max_tokens=256)}


@pytest.mark.parametrize("layer", [57])
def test_a_wrong_weight_in_one_of_80_layers_is_caught(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is that of the layer before: right in every shape, and only the numbers of all layers show it."""
    name = Period.weight

    def wrong(self: Period, node: Any, time: int) -> str:
        found = name(self, node, time)
        part = f"layers.{layer}.mlp.down_proj"
        return found.replace(part, f"layers.{layer - 1}.mlp.down_proj")

    model = make_deep("llama", 80)
    fuseline.compile(model, **OPTIONS)
    monkeypatch.setattr(Period, "weight", wrong)
    with pytest.raises(fuseline.UnsupportedModelError, match="give other logits"):
        fuseline.compile(model, **OPTIONS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_mixing_in_any_of_the_layers_that_are_checked_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of each layer that the folded graph states adds a little of the row before, of another sequence."""
    model = make_deep(name, 12)
    report = Report("cpu", "float32")
    loop = lower(skeleton(model, torch.float32), SIZES, Wishes(), report).loop.short
    attention = [node for node in loop.graph.calls() if str(node.target) == "nn.paged_attention"]
    assert 3 <= len(attention) < 12
    weights = {key: item.detach() for key, item in model.named_parameters(remove_duplicate=False)}
    weights |= dict(model.named_buffers())
    cpu = torch.device("cpu")
    constants = fold_constants(loop, weights, cpu, {})
    plain = Executor._reference

    def check(broken: Any) -> float:
        def reference(self: Executor, node: Any) -> Any:
            run, out = plain(self, node), self._slots[node]

            def mixed(values: list[Any], dims: Any) -> None:
                run(values, dims)
                values[out] = values[out] + 0.1 * values[out].roll(1, 0)

            return mixed if node is broken else run

        monkeypatch.setattr(Executor, "_reference", reference)
        executor = Executor(loop, constants, new_caches(loop, most_slots(16), cpu), cpu)
        return check_concatenation(executor.poisoned, 99, 16, cpu, 1e-4, True, 64)

    assert check(None) < 1e-5
    for node in attention:
        with pytest.raises(fuseline.UnsupportedModelError, match="two concatenated sequences"):
            check(node)


def test_a_leak_between_sequences_in_late_layers_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a turn of the loop that the few layers have not: the prompt that all layers run has a neighbour."""
    plain = Executor.__call__

    def leaky(self: Executor, step: Any) -> torch.Tensor:
        logits = plain(self, step)
        turns = max(len(stage.fixed) for stage in self._stages)
        return logits + 0.1 * logits.mean(0) if turns > 1 and len(step.query_starts) > 2 else logits

    model = make_deep("llama", 12)
    monkeypatch.setattr(Executor, "__call__", leaky)
    with pytest.raises(fuseline.UnsupportedModelError, match="give other logits"):
        fuseline.compile(model, **OPTIONS)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_moe"])
def test_a_loop_computes_what_all_layers_written_out_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_deep(name, 12)
    prompts = [[5, 6, 7, 8, 9], [3, 1, 4]]
    looped = fuseline.compile(model, **OPTIONS)
    monkeypatch.setattr("fuseline.runtime.lower.loop_of", lambda whole: Loop.plain(whole.graph))
    written = fuseline.compile(model, **OPTIONS)
    assert torch.equal(looped(prompts).logits, written(prompts).logits)
    assert looped.generate(prompts, max_new_tokens=6) == written.generate(prompts, max_new_tokens=6)
    assert looped.report.weight_bytes == written.report.weight_bytes
    assert looped.report.cache_bytes == written.report.cache_bytes


def test_a_model_whose_own_code_needs_all_layers_to_run_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    plain = LlamaModel.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == "eager":
            assert len(self.layers) == 8
        return plain(self, *args, **kwargs)

    class Counting(LlamaModel):
        forward = counting

    model = make_deep("llama", 8)
    model.model.__class__ = Counting
    compiled = fuseline.compile(model, **OPTIONS)
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(prompt).logits
    assert float((compiled(prompt).logits - expected).norm() / expected.norm()) < 1e-5
