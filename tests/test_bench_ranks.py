"""``fuseline bench`` of ranks: what each must read is the floor, and the first one speaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benching import SIZES, call, save_tiny
from families import make
from tensor_parallel import mpirun, needs_mpirun

import fuseline
from fuseline.runtime.bench import results
from fuseline.runtime.bench.floor import decode_bytes
from fuseline.runtime.bench.launched import place_of_rank
from fuseline.runtime.bench.workloads import Stream

FEW = ["--batches", "3", "--repeats", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_ranks_are_measured_by_what_each_must_read(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They share the memory of one machine: half of the bytes at half of the rate, and what all hold counts twice."""
    file = tmp_path / "results.json"
    options = ["--workloads", "decode,rates", "--tensor-parallel", "2", "--against", "eager", "--json", str(file)]
    assert call(monkeypatch, tiny, *options, *SIZES, *FEW) == 0
    first, decode, rates, eager = results.read([file])
    assert (eager.who, eager.label) == ("eager", "start-up")
    assert eager.note == "runs on one device, and this is about 2 ranks"
    for item in (first, decode, rates):
        assert item.right and (item.dtype, item.machine["ranks"]) == ("float32, 2 ranks", 2)
    assert decode.check == "same 3/3" and rates.check == "same 6/6"
    whole = decode_bytes(fuseline.compile(tiny, device="cpu", max_seq_len=64).graph, 3, 8 + 6 // 2)
    assert decode.floor_ms and 1e3 * whole / 1e10 < decode.floor_ms < 1.5e3 * whole / 1e10
    assert "for each of 2 ranks" in capsys.readouterr().out


def test_ranks_with_experts_of_their_own_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("qwen3_moe").save_pretrained(tmp_path / "model")
    file, options = tmp_path / "results.json", ["--workloads", "decode", "--expert-parallel", "*.experts.*"]
    ranks = ["--tensor-parallel", "2", "--json", str(file)]
    assert call(monkeypatch, str(tmp_path / "model"), *options, *ranks, *SIZES, *FEW) == 0
    start, decode = results.read([file])
    assert start.dtype == decode.dtype == "float32, 2 ranks, experts divided" and decode.check == "same 3/3"
    capsys.readouterr()
    assert call(monkeypatch, str(tmp_path / "model"), *options, *SIZES, *FEW) != 0
    assert "expert_parallel=('*.experts.*',) is for several ranks" in capsys.readouterr().err


@needs_mpirun
def test_the_first_of_the_ranks_that_were_started_speaks(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = ["-m", "fuseline.runtime.cli", "bench", tiny, "--device", "cpu", "--tensor-parallel", "2"]
    done = mpirun(2, *command, "--workloads", "decode,mixed", "--json", str(file), *SIZES, *FEW)
    assert done.returncode == 0, done.stderr
    found = results.read([file])
    assert [item.label for item in found] == ["start-up", "decode 3 x 8+6", "mixed 6 requests"]
    assert all(item.right and item.ms for item in found) and all(item.check for item in found[1:])
    assert [done.stdout.count(results.row(item)) for item in found] == [1] * 3


def test_started_ranks_do_not_look_at_clocks() -> None:
    work = [Stream("rates", 3, (2, 3), (2, 3), rate=1.0)]
    with pytest.raises(fuseline.OptionError, match="requests arrive by the clock"):
        place_of_rank(2, torch.device("cpu"), work)
