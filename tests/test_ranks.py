"""Dumps of several ranks: each writes its own. If this fails, ranks overwrite each other's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import make
from tensor_parallel import LIGHT, mpirun, needs_mpirun

import fuseline
from fuseline.runtime.ranks import path_of_rank, rank_of


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, 3),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, 0),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "high", "WORLD_SIZE": "2"}, None),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "RANK": "5", "WORLD_SIZE": "8"}, 5),
    ],
)
def test_launchers_are_understood(environment: dict[str, str], rank: int | None) -> None:
    assert rank_of(environment) == rank
    own = "out" if rank is None else f"out/rank{rank}"
    assert path_of_rank("out", environment) == Path(own)
    page = "a/page.html" if rank is None else f"a/page.rank{rank}.html"
    assert path_of_rank("a/page.html", environment) == Path(page)


def test_ranks_dump_to_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        model = make("llama")
        compiled = fuseline.compile(model, device="cpu", max_seq_len=64, dump=tmp_path)
        compiled.dump(tmp_path / "again")
        assert (tmp_path / f"rank{rank}" / "000_capture.txt").exists()
        assert (tmp_path / "again" / f"rank{rank}" / "report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "rank0", "rank1"]
    fuseline.compile(model, device="cpu", max_seq_len=64, dump=tmp_path / "page.html")
    assert (tmp_path / "page.rank1.html").exists()


@needs_mpirun
def test_processes_of_mpirun_are_told_apart(tmp_path: Path) -> None:
    # Each makes its directory: what processes print at the same time may meet on one line.
    program = (
        "import sys; from fuseline.runtime.ranks import path_of_rank; path_of_rank(sys.argv[1]).mkdir(parents=True)"
    )
    done = mpirun(2, "-c", LIGHT + program, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rank0", "rank1"]
