"""Deep models are captured with a few layers that stand for all: the whole graph is the one that all layers would have given.

If this fails, a deep model computes something else than a shallow one, or its dumps and counts do not tell the truth.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deep import make_deep
from transformers.models.llama import modeling_llama

import fuseline
from fuseline import ir, passes
from fuseline.ir.capture import capture
from fuseline.ir.skeleton import skeleton
from fuseline.ir.unfold import unfold

# Names that passes give to values of their own are numbered over the whole graph.
_NUMBERED = re.compile(r"\b(add_rms_norm|transpose|unsqueeze|cat)(_\d+)*_*\b")


def captured(model: Any, fold: bool = True) -> ir.Graph:
    return capture(skeleton(model, torch.float32), {"kv_block": 16}, 64, fold)


@pytest.mark.parametrize(
    ("name", "layers", "traced"),
    [
        ("llama", 8, 3),
        ("qwen3", 7, 3),
        ("gpt2", 7, 3),
        ("gemma2", 11, 7),
        ("gemma3_text", 14, 11),
        ("gpt_oss", 9, 7),
        ("mixtral", 6, 3),
        ("glm4", 5, 3),
        ("granitemoe", 5, 3),  # its layers write out a number as a tensor
    ],
)
def test_a_folded_graph_unfolds_to_the_whole_one(name: str, layers: int, traced: int) -> None:
    model = make_deep(name, layers)
    folded = captured(model)
    assert folded.options["fold_layers"] == layers
    assert sum("nn.attention(" in line for line in str(folded).splitlines()) == traced
    assert len(model.base_model.layers if name != "gpt2" else model.transformer.h) == layers, (
        "the model is left as it was"
    )
    made = unfold(passes.run(folded)).graph
    ir.verify(made)
    whole = passes.run(captured(model, fold=False))
    assert _NUMBERED.sub(r"\1", str(made)) == _NUMBERED.sub(r"\1", str(whole))


def test_layers_that_differ_in_a_number_are_not_folded() -> None:
    model = make_deep("gpt2-inverse-layer", 8)
    assert "fold_layers" not in captured(model).options
    model = make_deep("llama", 8)
    model.model.layers[5].input_layernorm.variance_epsilon = 1e-3
    assert "fold_layers" not in captured(model).options


def test_layers_that_do_different_things_by_their_index_are_not_folded() -> None:
    """Nothing in the structure tells the layers apart, only their code does."""

    class Late(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.5 if self.layer_idx > 4 else 1.0)

    model = make_deep("llama", 8)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Late, index
    assert "fold_layers" not in captured(model).options


def test_a_model_whose_code_counts_on_all_its_layers_is_captured_whole() -> None:
    class Counting(modeling_llama.LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert len(self.layers) == 8
            return super().forward(*args, **kwargs)

    model = make_deep("llama", 8)
    model.model.__class__ = Counting
    graph = captured(model)
    assert "fold_layers" not in graph.options
    assert str(graph).count("nn.attention(") == 8


def test_layers_that_read_from_far_back_are_not_folded() -> None:
    model = make_deep("llama", 8)
    kept: dict[int, torch.Tensor] = {}

    class Skipping(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept[self.layer_idx] = x
            return super().forward(x) + kept[max(0, self.layer_idx - 2)]

    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Skipping, index
    graph = captured(model)
    if "fold_layers" in graph.options:
        with pytest.raises(Exception, match="differ|in another layer"):
            unfold(passes.run(graph))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_deep_model_computes_what_it_should_and_its_folded_dump_too(name: str, tmp_path: Path) -> None:
    model = make_deep(name, 10)
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "kv_cache": fuseline.KVCacheConfig(max_tokens=256)}
    compiled = fuseline.compile(model, dump=tmp_path, expect={"MergeQKV": 10, "MergeGateUp": 10}, **options)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        expected = model(prompt).logits
    assert float((compiled(prompt).logits - expected).norm() / expected.norm()) < 1e-5
    assert compiled.report.layers == 10
    assert set(compiled.report.layer_kernels) == set(range(10))
    assert sum(len(kernel.regions) for kernel in compiled.kernels) == compiled.report.kernel_calls
    merged = next(entry for entry in compiled.report.passes if entry.name == "MergeQKV")
    assert merged.fused[7].startswith("l7_")
    text = str(compiled.graph)
    assert str(ir.parse(text)) == text
    last = max(tmp_path.glob("[0-9]*.txt")).read_text()
    assert len(last) < 0.8 * len(text)
    for stage in ("000_capture.txt", max(tmp_path.glob("[0-9]*.txt")).name):
        again = fuseline.compile(ir.parse((tmp_path / stage).read_text()), weights=model, **options)
        assert str(again.graph) == text


def test_switching_one_application_off_in_a_deep_model_still_works() -> None:
    """A fusion missing in one of the layers that stand for others makes them unlike each other: all layers are captured."""
    model = make_deep("llama", 8)
    compiled = fuseline.compile(model, device="cpu", max_seq_len=64, skip=["FuseSiluMul#1"])
    assert str(compiled.graph).count("nn.silu_mul") == 7
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(prompt).logits
    assert float((compiled(prompt).logits - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_kernels_of_a_deep_model_are_those_of_a_shallow_one(name: str) -> None:
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "kv_cache": fuseline.KVCacheConfig(max_tokens=256)}
    shallow, deep = (fuseline.compile(make_deep(name, layers), **options) for layers in (4, 80))
    assert [kernel.source for kernel in shallow.kernels] == [kernel.source for kernel in deep.kernels]
    assert deep.report.layers == 80
