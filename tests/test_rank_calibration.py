"""Calibration of a model that ranks divide: the codes are those of the whole model, and a rank holds its part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import wide
from transformers import PreTrainedModel

import fuseline
from fuseline import ir
from fuseline.ir.quantized import is_quantised
from fuseline.runtime import compile as compile_module
from fuseline.runtime import parts as parts_module
from fuseline.runtime.calibration.activations import calibrate
from fuseline.runtime.parts import Part, place_parts


def tokens_for(model: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (24, 48), generator=generator).tolist()  # type: ignore[no-any-return]


class Watched:
    """What compiles calibrate, and what each rank then holds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.values: list[dict[str, torch.Tensor]] = []
        self.parts: list[list[Part]] = []
        patch.setattr(compile_module, "calibrate", self.calibrate)
        patch.setattr(compile_module, "place_parts", self.place_parts)
        patch.setattr(parts_module, "pack_linears", lambda loop, constants: ({}, 0))

    def calibrate(self, *arguments: Any) -> Any:
        found = calibrate(*arguments)
        self.values.append(found.values)
        return found

    def place_parts(self, *arguments: Any) -> Any:
        found = place_parts(*arguments)
        self.parts.append(found[0])
        return found

    def held(self, part: Part) -> list[torch.Tensor]:
        """The rounded weights of a rank."""
        return [item for node, items in part.constants.items() if is_quantised(node) for item in items]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama", "int8-dynamic"),
        ("qwen2", {"lm_head": "int8", "*": "int4g32"}),
        ("mixtral", {"*.experts*": "int8", "*": "int8"}),
    ],
)
def test_codes_are_those_of_the_whole_model(
    name: str, quantization: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, watched = wide(name), Watched(monkeypatch)
    ids = tokens_for(model)
    options: dict[str, Any] = {"quantization": quantization, "device": "cpu", "max_seq_len": 64}
    options["calibration"] = fuseline.Calibration(ids)
    whole = fuseline.compile(model, **options)
    ranks = fuseline.compile(model, tensor_parallel=2, simulate=True, dump=tmp_path, **options)
    expected, found = watched.values
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    assert ranks.report.calibration == whole.report.calibration
    left, right = whole(ids[:2]).logits, ranks(ids[:2]).logits
    errors = (left - right).norm(dim=-1) / left.norm(dim=-1)
    assert errors.median() <= 1e-5 and errors.max() <= 0.05
    (alone,), parts = watched.parts
    all_of_it = sum(item.nbytes for item in watched.held(alone))
    for part in parts:
        held = watched.held(part)
        assert all(item.untyped_storage().nbytes() == item.nbytes for item in held), "no part keeps the whole"
        assert sum(item.nbytes for item in held) < 0.7 * all_of_it
    text = next(tmp_path.glob("*_Shard.txt")).read_text()
    assert "calibration: option(True)" in text and ir.dump(ir.parse(text)) == text


def test_a_graph_from_a_dump_is_not_calibrated_for_ranks() -> None:
    text = "def f(x: f32[T, 4], *, T: dim(1, 8), tensor_parallel: option(2)):\n    return x\n"
    options: dict[str, Any] = {"weights": "nowhere", "device": "cpu", "tensor_parallel": 2, "simulate": True}
    with pytest.raises(fuseline.OptionError, match="calibration with tensor_parallel is for a model"):
        fuseline.compile(ir.parse(text), calibration=fuseline.Calibration([[1]]), **options)
