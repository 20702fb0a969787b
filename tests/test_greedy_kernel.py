"""The kernel that chooses the most likely tokens, against torch: interpreted, and compiled for GPUs."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from fuseline.codegen.greedy import greedy_source
from fuseline.codegen.launch import load_greedy
from fuseline.codegen.offline import check_file, load_kernel_file

WIDTHS = (1, 300, 2048, 2049, 32000)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "greedy.py"
    path.write_text(greedy_source())
    return str(path)


def cases(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with equal maxima in one part and in several, with a maximum at either end, and equal throughout."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(6, width, generator=generator).to(dtype)
    logits[1, 0] = logits[2, -1] = logits.max() + 1
    logits[3] = -2.0
    logits[4, width // 3 :: max(1, width // 7)] = 9.0
    logits[5, width // 2 :] = 7.0
    return logits


def spoilt(width: int) -> tuple[torch.Tensor, list[bool]]:
    """Rows of which each but the first holds something that is no number, first or last or in the middle."""
    logits = cases(width, torch.float32)
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"), float("nan"), -float("inf")), start=1):
        logits[row, (0, width - 1, width // 2)[row % 3]] = value
    return logits, [True] + [False] * 5


def chosen(path: str | None, logits: torch.Tensor, turns: int = 1) -> tuple[list[int], list[bool]]:
    launch = load_greedy() if path is None else load_kernel_file(path).launch
    tokens = torch.full((len(logits),), -5, device=logits.device)
    finite = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for _ in range(turns):
        launch(logits, tokens, finite)
    return tokens.tolist(), finite.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_lowest_of_the_most_likely(width: int, dtype: torch.dtype, file: str, pool: ProcessPoolExecutor) -> None:
    logits = cases(width, dtype)
    wide = logits.float()
    wanted = (wide == wide.amax(-1, keepdim=True)).int().argmax(-1).tolist()
    for turns in (1, 2):  # the second launch finds the counters as the first left them
        assert pool.submit(chosen, file, logits, turns).result() == (wanted, [True] * len(logits))


@pytest.mark.parametrize("width", [2, 2049, 32000])
def test_what_is_no_number_is_found(width: int, file: str, pool: ProcessPoolExecutor) -> None:
    logits, wanted = spoilt(width)
    assert pool.submit(chosen, file, logits).result()[1] == wanted


def test_it_compiles(file: str) -> None:
    resources = check_file(file, (80, 90))
    # Rows of 50,257 begin at any address; all others are read 16 bytes at a time.
    assert sorted("ld.global.v4" in found.ptx for found in resources) == [False] * 2 + [True] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [300, 32000, 128256])
def test_on_a_gpu(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = cases(width, dtype).repeat(11, 1).cuda()
        wanted = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1).tolist()
        assert chosen(None, logits, turns=3) == (wanted, [True] * len(logits))
    logits, finite = spoilt(width)
    assert chosen(None, logits.cuda())[1] == finite
