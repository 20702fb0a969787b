"""Checkpoints that are written: read again as they were rounded, by us and by others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import PROMPTS, SMALL, distance
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from deep import make_deep
from quantized_models import wide
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fuseline
from fuseline.runtime.cli import app


def loaded(folder: Path) -> Any:
    """A checkpoint as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def unpacked_by_the_library(folder: Path, model: Any) -> Any:
    """A model with the numbers that the format's library finds in a checkpoint. Transformers cannot load zero points: it
    makes room for them as they are before they are packed."""
    twin, state = copy.deepcopy(model), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**{name: config[name] for name in ("targets", "weights")})
    packer = BaseCompressor.get_value_from_registry(config["format"])
    with torch.no_grad():
        for name, module in twin.named_modules():
            own = {
                key.removeprefix(f"{name}."): item for key, item in state.items() if key.startswith(f"{name}.weight_")
            }
            if own:
                module.weight.copy_(packer.decompress(own, scheme)["weight"])
    return twin


@pytest.mark.parametrize("scheme", ["int8", "int8g32", "int4g32", "uint4g32", "int8-dynamic", "fp8"])
def test_what_is_written_is_read_as_it_was_rounded(scheme: str, tmp_path: Path) -> None:
    """By us exactly, and by transformers with the library of the format."""
    model = wide("llama")
    said = fuseline.quantize(model, tmp_path, scheme, device="cpu")
    assert said.startswith("14 matrices, rounded to nearest")
    rounded = fuseline.compile(model, quantization=scheme, **SMALL)
    again = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    assert again.report.bytes_by_type == rounded.report.bytes_by_type
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        assert torch.equal(again(tokens).logits, rounded(tokens).logits)
    theirs = unpacked_by_the_library(tmp_path, model) if scheme.startswith("u") else loaded(tmp_path)
    # The library rounds the factors of rows in its own way, and some codes with them.
    assert distance(theirs, again) < (5e-2 if scheme in ("int8-dynamic", "fp8") else 1e-4)


@pytest.mark.parametrize(
    ("family", "scheme"), [("qwen3_moe", "int4g32"), ("mixtral", "fp8"), ("qwen2_moe", "uint4g32")]
)
def test_experts_are_written_as_their_families_are(family: str, scheme: str, tmp_path: Path) -> None:
    model = wide(family)
    model.save_pretrained(tmp_path / "plain")
    fuseline.quantize(model, tmp_path / "out", scheme, device="cpu")
    plain, state = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    codes = "weight" if scheme == "fp8" else "weight_packed"
    rounded_there = {name.removesuffix(".weight_scale") for name in state if name.endswith(".weight_scale")}
    assert any(".experts.3." in name for name in rounded_there)
    for name, item in plain.items():
        module = name.removesuffix(".weight")
        if module in rounded_there:
            depth = item.shape[1] // (1 if scheme == "fp8" else 8)
            assert state[f"{module}.{codes}"].shape == (item.shape[0], depth)
        else:
            assert torch.equal(state[name], item)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gate = "block_sparse_moe.gate" if family == "mixtral" else "mlp.gate"
    assert f"model.layers.1.{gate}" in config["ignore"] and not rounded_there & set(config["ignore"])
    rounded = fuseline.compile(model, quantization=scheme, **SMALL)
    again = fuseline.compile(str(tmp_path / "out"), dtype="float32", **SMALL)
    assert again.report.bytes_by_type == rounded.report.bytes_by_type
    for prompt in PROMPTS:
        assert torch.equal(again(torch.tensor([prompt])).logits, rounded(torch.tensor([prompt])).logits)


def test_schemes_by_pattern_and_calibrated_weights_are_written(tmp_path: Path) -> None:
    wide("qwen2").save_pretrained(tmp_path / "model")
    wanted = {"*.down_proj": None, "*.o_proj": "int8", "*": "int4g32"}
    calibration = fuseline.Calibration([[5, 3, 8, 1, 9, 40, 77] * 4, [1, 2, 3, 4] * 8])
    options: dict[str, Any] = {"calibration": calibration, "device": "cpu", "dtype": "float32"}
    said = fuseline.quantize(str(tmp_path / "model"), tmp_path / "out", wanted, **options)
    assert said.startswith("12 matrices, 6 weights by GPTQ") or "by GPTQ" in said
    rounded = fuseline.compile(
        str(tmp_path / "model"), quantization=wanted, dtype="float32", calibration=calibration, **SMALL
    )
    again = fuseline.compile(str(tmp_path / "out"), dtype="float32", **SMALL)
    assert distance(loaded(tmp_path / "out"), again) < 1e-4
    for prompt in PROMPTS:
        assert torch.equal(again(torch.tensor([prompt])).logits, rounded(torch.tensor([prompt])).logits)
    with pytest.raises(fuseline.OptionError, match="not empty"):
        fuseline.quantize(str(tmp_path / "model"), tmp_path / "out", "int8", device="cpu")


def test_a_rounded_output_projection_is_no_longer_tied(tmp_path: Path) -> None:
    model = make_deep("llama", 2, tie_word_embeddings=True, hidden_size=96, intermediate_size=160, head_dim=32)
    wanted = {"*.lm_head": "int8", "*": "int4g32"}
    fuseline.quantize(model, tmp_path, wanted, device="cpu", dtype="float32")
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert model.config.tie_word_embeddings
    rounded = fuseline.compile(model, quantization=wanted, **SMALL)
    again = fuseline.compile(str(tmp_path), dtype="float32", **SMALL)
    assert torch.equal(again(torch.tensor([PROMPTS[0]])).logits, rounded(torch.tensor([PROMPTS[0]])).logits)
    assert distance(loaded(tmp_path), again) < 1e-4


def test_matrices_that_the_format_does_not_know_are_refused(tmp_path: Path) -> None:
    """With what to ask for instead."""
    with pytest.raises(fuseline.UnsupportedModelError, match=r"computed from a weight .* {'\*.c_attn': None"):
        fuseline.quantize(wide("gpt2"), tmp_path, "int8", device="cpu")
    with pytest.raises(fuseline.UnsupportedModelError, match=r"{'\*.gate_up_proj': None"):
        fuseline.quantize(wide("gpt_oss"), tmp_path, "int8", device="cpu")
    said = fuseline.quantize(wide("gpt_oss"), tmp_path, {"*.experts.*": None, "*": "int8"}, device="cpu")
    assert said.startswith("8 matrices")


def test_the_command_writes_a_checkpoint_that_the_others_read(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "model")
    where, out = str(tmp_path / "model"), str(tmp_path / "out")
    done = CliRunner().invoke(app, ["quantize", where, out, "--quantization", "*=int4g32", "--device", "cpu"])
    assert done.exit_code == 0 and "14 matrices, rounded to nearest" in done.stdout, done.output
    shown = CliRunner().invoke(app, ["dump", out, "--device", "cpu"])
    assert shown.exit_code == 0 and "nn.cat_rows" in shown.stdout, shown.output
