"""Checkpoints that hold their weights rounded: read as they are, in every layout, and what cannot be read refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS, PROMPTS, SMALL, distance, group_config, written
from deep import make_deep
from quantized_models import wide
from rounded_checkpoints import packed, write
from safetensors.torch import load_file, save_file

import fuseline
from fuseline.ir.parse import parse


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_it_is(layout: str, tmp_path: Path) -> None:
    twin = written(layout, tmp_path)
    compiled = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    scheme = LAYOUTS[layout][0]
    assert compiled.report.bytes_by_type[scheme] > 0 and f"14 matrices {scheme}" in compiled.report.checkpoint
    assert distance(twin, compiled) < 1e-4 < distance(wide("llama"), compiled)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "phi3", "opt"])
@pytest.mark.parametrize("layout", ["awq", "W8A8", "gptq, act-order"])
def test_other_families_are_read(family: str, layout: str, tmp_path: Path) -> None:
    twin = written(layout, tmp_path, family)
    compiled = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    assert distance(twin, compiled) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "minimax_m2"])
@pytest.mark.parametrize("layout", ["gptq", "awq", "W4A16, zero points", "W8A16 in bytes", "W8A8", "FP8, one factor"])
def test_the_matrices_of_experts_are_read_as_they_are(family: str, layout: str, tmp_path: Path) -> None:
    """Files hold three for each expert, under names of their own; a model has two values for all experts."""
    twin = written(layout, tmp_path, family)
    compiled = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    whole = sum(item.numel() for item in twin.parameters() if item.dim() == 3)
    assert compiled.report.bytes_by_type[LAYOUTS[layout][0]] > whole / 2
    assert distance(twin, compiled) < 1e-4 < distance(wide(family), compiled)


@pytest.mark.parametrize("options", [{}, {"expert_parallel": ["*.experts.*"]}], ids=["cut", "divided"])
@pytest.mark.parametrize("layout", ["gptq", "FP8"])
def test_ranks_divide_rounded_experts(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    written(layout, tmp_path, "qwen3_moe")
    alone = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    ranks = fuseline.compile(str(tmp_path), dtype="float32", tensor_parallel=3, simulate=True, **options, **SMALL)
    assert ranks.generate(PROMPTS, max_new_tokens=6) == alone.generate(PROMPTS, max_new_tokens=6)
    assert ranks.report.bytes_by_type[LAYOUTS[layout][0]] < alone.report.bytes_by_type[LAYOUTS[layout][0]] * 0.6


def test_patterns_and_layers_choose_the_scheme(tmp_path: Path) -> None:
    """A module goes by the group that names it before one that names its class; layers need not be alike."""
    config = group_config(4, 32, True, "pack-quantized")
    other = group_config(8, -1, True, "pack-quantized")["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**other, "targets": ["re:.*down_proj", "model.layers.1.self_attn.o_proj"]}

    def is_other(name: str) -> bool:
        return "down_proj" in name or name == "model.layers.1.self_attn.o_proj"

    model = wide("llama-three-layers")
    write(tmp_path, model, config, partial(packed, bits=4, group=32, sym=True), lambda name: not is_other(name))
    state = load_file(tmp_path / "model.safetensors")
    twin = write(tmp_path, model, config, partial(packed, bits=8, group=-1, sym=True), is_other)
    rest = load_file(tmp_path / "model.safetensors")
    held = {
        name: rest.get(name, state.get(name)) for name in {*rest, *state} if f"{name}_packed" not in {*rest, *state}
    }
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for name, module in twin.named_modules():
            if f"{name}.weight_packed" in state:
                codes = torch.stack([state[f"{name}.weight_packed"] >> 4 * bit & 15 for bit in range(8)], -1).flatten(1)
                parts = (codes - 8).float().unflatten(1, (-1, 32)) * state[f"{name}.weight_scale"].float()[..., None]
                module.weight.copy_(parts.flatten(1))
    compiled = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    assert {"int4g32", "int8"} <= set(compiled.report.bytes_by_type)
    assert distance(twin, compiled) < 1e-4


@pytest.mark.parametrize("layout, rounded", [("awq", 0), ("awq", 2), ("gptq, act-order", 0)])
def test_layers_that_are_held_alike_are_folded(layout: str, rounded: int, tmp_path: Path) -> None:
    model = make_deep("llama", 9, hidden_size=96, intermediate_size=160, head_dim=32)

    def chosen(name: str) -> bool:
        return int(name.split(".")[2]) >= rounded

    twin = write(tmp_path, model, *LAYOUTS[layout][1:], chosen)
    compiled = fuseline.compile(str(tmp_path), dtype="float32", dump=tmp_path / "dump", **SMALL)
    assert distance(twin, compiled) < 1e-4
    captured = next((tmp_path / "dump").glob("*_capture.txt")).read_text()
    assert ("fold_layers" in captured) == (rounded == 0)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        *((layout, "llama") for layout in ("gptq, zero points", "gptq, act-order", "W8A8")),
        ("W4A16", "qwen3_moe"),
        ("FP8", "mixtral"),
    ],
)
def test_passes_keep_the_numbers_and_a_dump_is_read_again(layout: str, family: str, tmp_path: Path) -> None:
    written(layout, tmp_path / "model", family)
    where = str(tmp_path / "model")
    compiled = fuseline.compile(where, dtype="float32", verify=True, dump=tmp_path / "dump", **SMALL)
    assert "every pass keeps the numbers" in compiled.report.verification
    scheme = LAYOUTS[layout][0]
    for stage, stated in (
        ("capture", "aten.to.dtype(l0_self_attn_q_proj_weight, f32)"),
        ("ReadRounded", "aten.index_select(" if "order" in layout else "nn.cat_rows("),
    ):
        text = next((tmp_path / "dump").glob(f"*_{stage}.txt")).read_text()
        assert f'{scheme}[96, 96] = weight("model.layers.0.self_attn.q_proj.weight")' in text and stated in text
        again = fuseline.compile(parse(text), weights=where, dtype="float32", **SMALL)
        assert again.generate(PROMPTS, max_new_tokens=4) == compiled.generate(PROMPTS, max_new_tokens=4)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **facts: Any) -> str:
    """A checkpoint with some of its tensors and of its quantization's config changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(facts)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def nothing(state: dict[str, torch.Tensor]) -> None:
    """Leaves the tensors as they are."""


def uneven(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("g_idx"))
    state[name][0] = 1


STATIC = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"dynamic": False}}}
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "groups of other sizes": ("gptq", uneven, {}, "groups of inputs differ in size"),
    "marlin": ("gptq", nothing, {"checkpoint_format": "marlin"}, "'marlin' is not known"),
    "gemv": ("awq", nothing, {"version": "gemv"}, "version 'gemv' of 4 bits is not known"),
    "bitsandbytes": ("awq", nothing, {"quant_method": "bitsandbytes"}, "quantized by bitsandbytes are not supported"),
    "nvfp4": ("W4A16", nothing, {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' is not supported"),
    "sparse": ("W4A16", nothing, {"sparsity_config": {"format": "sparse-24"}}, "sparsity or transforms"),
    "static rows": ("W8A8", nothing, {"config_groups": STATIC}, "with a factor for each token"),
    "no group": ("W8A8", nothing, {"config_groups": {}}, "no group, or several groups"),
    "a missing weight": ("awq", lambda state: state.pop("model.norm.weight"), {}, "model.norm.weight is in one"),
    "a weight too many": (
        "awq",
        lambda state: state.update({"model.layers.0.mlp.up_proj.bias": torch.ones(9)}),
        {},
        "up_proj.bias is in one of them only",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str, tmp_path: Path) -> None:
    layout, change, facts, why = REFUSED[case]
    written(layout, tmp_path)
    with pytest.raises(fuseline.UnsupportedModelError, match=why):
        fuseline.compile(rewritten(tmp_path, change, **facts), dtype="float32", **SMALL)


def one_expert_less(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".1.mlp.experts.3.up_proj." in name]:
        del state[name]


def one_expert_in_bytes(state: dict[str, torch.Tensor]) -> None:
    module = "model.layers.1.mlp.experts.3.down_proj"
    rows, words = state.pop(f"{module}.weight_packed").shape
    state[f"{module}.weight"] = torch.ones(rows, words * 8, dtype=torch.int8)
    state[f"{module}.weight_scale"] = torch.ones(rows, 1)


@pytest.mark.parametrize(
    ("layout", "change", "why"),
    [
        ("W4A16", one_expert_less, "layers.1.mlp.experts.*these 7 matrices are .* cannot make up"),
        ("W4A16", one_expert_in_bytes, "experts.down_proj .* 4 matrices are held in several schemes: int4g32, int8"),
        ("gptq, act-order", nothing, "experts.* orders of inputs of their own"),
    ],
    ids=["incomplete", "several schemes", "act-order"],
)
def test_experts_that_make_no_value_are_refused(layout: str, change: Any, why: str, tmp_path: Path) -> None:
    written(layout, tmp_path, "qwen3_moe")
    with pytest.raises(fuseline.UnsupportedModelError, match=why):
        fuseline.compile(rewritten(tmp_path, change), dtype="float32", **SMALL)


def test_a_rounded_embedding_is_refused(tmp_path: Path) -> None:
    written("W8A16 in bytes", tmp_path)

    def embedding(state: dict[str, torch.Tensor]) -> None:
        table = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = table.clamp(-1, 1).mul(127).to(torch.int8)
        state["model.embed_tokens.weight_scale"] = torch.ones(len(table), 1)

    with pytest.raises(
        fuseline.UnsupportedModelError, match=r"embed_tokens.weight as int8.*aten.embedding.*its numbers"
    ):
        fuseline.compile(rewritten(tmp_path, embedding), dtype="float32", **SMALL)


def test_a_rounded_checkpoint_is_not_rounded_again(tmp_path: Path) -> None:
    written("awq", tmp_path)
    with pytest.raises(fuseline.runtime.options.OptionError, match="rounded weights already"):
        fuseline.compile(str(tmp_path), quantization="int8", **SMALL)


def test_several_files_narrow_types_and_models_with_experts_are_read(tmp_path: Path) -> None:
    """Experts stay as they are there: attention alone is rounded."""
    config, made = LAYOUTS["awq"][1:]
    twin = write(tmp_path, wide("mixtral"), config, made, lambda name: "self_attn" in name)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number in range(2):
        part = {name: item for place, (name, item) in enumerate(sorted(state.items())) if place % 2 == number}
        save_file(part, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
    assert distance(twin, fuseline.compile(str(tmp_path), dtype="float32", **SMALL)) < 1e-4
    narrow = fuseline.compile(str(tmp_path), dtype="bfloat16", **SMALL)
    assert narrow.report.bytes_by_type["uint4g32"] > 0 and distance(twin, narrow) < 0.1


def test_a_pass_that_fails_on_rounded_weights_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written("awq", tmp_path)

    def fails(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr("fuseline.passes.read_rounded._codes", fails)
    with pytest.raises(fuseline.UnsupportedModelError, match="ReadRounded cannot handle this model: IndexError"):
        fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
