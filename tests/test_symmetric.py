"""Memory that ranks map: where it cannot be, all say so and none waits."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseline.codegen.exchange import MirrorExchange, Places
from fuseline.runtime.symmetric import _Memory, mapped


class _Others:
    """A group of two whose other rank has nothing to tell."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("nothing is added up")

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.told.append(x)
        return [x, torch.zeros_like(x)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that has no GPU")
def test_a_rank_that_has_no_memory_tells_the_others_so() -> None:
    group = _Others()
    with pytest.raises((ImportError, RuntimeError)):
        mapped(16, torch.device("cuda", 0), group)
    (told,) = group.told
    assert not told[:64].any() and told[64:].any(), "no handle, but where it is"


class _Handle:
    def __init__(self) -> None:
        self._store = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:
        return ctypes.addressof(self._store)

    def told(self) -> bytes:
        return self._store.raw


class _CUDA:
    """Calls of CUDA that succeed but for handles that begin with 9: one opens at a hundred times its first byte."""

    cudaError_t = SimpleNamespace(cudaSuccess="fine")
    cudaIpcMemHandle_t = _Handle
    cudaIpcMemLazyEnablePeerAccess = 1

    def cudaIpcOpenMemHandle(self, handle: _Handle, flags: int) -> tuple[Any, ...]:
        first = handle.told()[0]
        return (SimpleNamespace(name="no peer"), None) if first == 9 else ("fine", 100 * first)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return ("fine",)


def _memory() -> _Memory:
    memory = _Memory.__new__(_Memory)
    memory._cuda, memory.addresses, memory._opened = _CUDA(), [7], []
    return memory


def test_addresses_stand_in_the_order_of_the_ranks() -> None:
    memory = _memory()
    memory.open([bytes([rank + 1]) * 64 for rank in range(3)], 1, [b"here"] * 3)
    assert memory.addresses == [100, 7, 300]
    assert memory._opened == [100, 300]


@pytest.mark.parametrize(
    ("handles", "machines", "why"),
    [
        ([1, 2], [b"here", b"there"], "several machines"),
        ([1, 0], [b"here", b"here"], "rank 1 has no memory"),
        ([1, 9], [b"here", b"here"], "no peer of CUDA"),
    ],
)
def test_what_stands_in_the_way_of_mapping_is_said(handles: list[int], machines: list[bytes], why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        _memory().open([bytes([first]) * 64 for first in handles], 0, machines)


@pytest.mark.parametrize("step", [0, 3, 2**30])
def test_an_answer_is_what_the_last_meeting_of_a_step_waits_for(step: int) -> None:
    """Kernels count in 32 bits, and so do the words that they wait for."""
    places = Places(2, 64, meetings=4)
    exchange = MirrorExchange(places, "cpu")
    exchange._steps.fill_(step)
    exchange.answer()
    tag = exchange._steps * places.meetings + places.meetings
    assert ((exchange.meeting["mine_ptr"] >> 32).to(torch.int32) == tag).all()
