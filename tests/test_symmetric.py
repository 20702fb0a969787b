"""Memory that ranks map: those that cannot find each other say so at once, and do not wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuseline.runtime.symmetric import mapped


class _Others:
    """A group whose other rank has mapped memory once more than this process."""

    rank, size = 0, 2

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("nothing is added up")

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x, x + 1]


def test_processes_with_another_past_do_not_wait_for_each_other() -> None:
    """A first process that goes on with new ranks has numbers that these do not have."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match="before"):
            mapped(16, torch.device("cpu"), _Others(), None)
