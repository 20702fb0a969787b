"""What the tests of ``fuseline bench`` share: a tiny model, small sizes, and a call of the command."""

from __future__ import annotations

import sys
from pathlib import Path

import families
import pytest

from fuseline.runtime import cli
from fuseline.runtime.bench import run

SIZES = ["--batches", "1,3", "--prompt", "8", "--new", "6", "--prefill", "3x16", "--requests", "6"]
SIZES += ["--prompts", "4-20", "--outputs", "1-5", "--rates", "30", "--rate-seconds", "0.2", "--repeats", "2"]


def save_tiny(path: Path) -> str:
    """The directory, with a tiny llama in it and a model of no known type in ``bert``."""
    families.make("llama").save_pretrained(path)
    (path / "bert").mkdir()
    (path / "bert" / "config.json").write_text('{"model_type": "no such type"}')
    return str(path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``fuseline bench ARGUMENTS`` on the CPU."""
    monkeypatch.setattr(sys, "argv", ["fuseline", "bench", *arguments, "--device", "cpu"])
    # What the machine can do takes a second to measure, and is of no interest here.
    monkeypatch.setattr("fuseline.runtime.bench.command.measure_rates", lambda *_: run.Rates(1e10, 1e11))
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
