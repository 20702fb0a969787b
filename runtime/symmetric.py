"""Memory that the GPUs of all ranks of a machine map, each rank in a process of its own."""

from __future__ import annotations

import ctypes
import hashlib
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.dist import Group

_HANDLE = 64  # bytes of a handle that CUDA tells other processes of memory by
_MACHINE = 32  # and of what tells machines apart


def mapped(words: int, device: torch.device, group: Group) -> tuple[Tensor, list[int]]:
    """Zeros ``[words]`` of 64 bits that all ranks can write to, and the addresses of all ranks' ones.

    The memory is mapped for as long as the tensor lives. All ranks call this together.

    Raises:
        RuntimeError: the ranks are not all on one machine, or their GPUs cannot map each other's memory.
        ImportError: ``cuda.bindings``, which torch for CUDA brings along, is missing.
    """
    told, own, failed = bytes(_HANDLE), None, None
    try:
        own = _Memory(words, device)
        told = own.handle()
    except (RuntimeError, ImportError) as error:  # the others are told nothing, and do not wait
        failed = error
    said = torch.tensor(list(told + _machine()), dtype=torch.uint8)
    heard = [bytes(item.tolist()) for item in group.all_gather(said)]
    if own is None or failed is not None:
        raise failed or RuntimeError("no memory")
    own.open([item[:_HANDLE] for item in heard], group.rank, [item[_HANDLE:] for item in heard])
    # A tensor on memory that is not torch's keeps alive whom it has it from.
    return torch.as_tensor(own, device=device), own.addresses


class _Memory:
    """Memory of this process and, of other processes, what ``open`` maps; all is given back when it is forgotten."""

    def __init__(self, words: int, device: torch.device) -> None:
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        torch.cuda.set_device(device)
        address = int(_checked(runtime, runtime.cudaMalloc(words * 8)))
        self.addresses = [address]
        self._opened: list[int] = []
        end = weakref.finalize(self, _give_back, runtime, device.index, self.addresses[0], self._opened)
        end.atexit = False  # the end of the process gives all back
        _checked(runtime, runtime.cudaMemset(address, 0, words * 8))
        torch.cuda.synchronize(device)
        self.__cuda_array_interface__ = {
            "shape": (words,),
            "typestr": "<i8",
            "data": (address, False),
            "version": 3,
        }

    def handle(self) -> bytes:
        """What other processes open this memory by."""
        found = _checked(self._cuda, self._cuda.cudaIpcGetMemHandle(self.addresses[0]))
        return ctypes.string_at(found.getPtr(), _HANDLE)

    def open(self, handles: Sequence[bytes], own: int, machines: Sequence[bytes]) -> None:
        """Map what the ranks have told of theirs; ``addresses`` are then those of all, in their order."""
        if len(set(machines)) > 1:
            raise RuntimeError("the ranks are on several machines")
        mine = self.addresses.pop()
        for rank, told in enumerate(handles):
            if rank == own:
                self.addresses.append(mine)
                continue
            if not any(told):
                raise RuntimeError(f"rank {rank} has no memory to map")
            handle = self._cuda.cudaIpcMemHandle_t()
            ctypes.memmove(handle.getPtr(), told, _HANDLE)
            near = self._cuda.cudaIpcMemLazyEnablePeerAccess
            address = int(_checked(self._cuda, self._cuda.cudaIpcOpenMemHandle(handle, near)))
            self._opened.append(address)
            self.addresses.append(address)


def _give_back(cuda: Any, index: int, own: int, opened: Sequence[int]) -> None:
    cuda.cudaSetDevice(index)
    for address in opened:
        cuda.cudaIpcCloseMemHandle(address)
    cuda.cudaFree(own)


def _checked(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA gives. Raises RuntimeError with the name of the error."""
    code, *found = answer
    if code != cuda.cudaError_t.cudaSuccess:
        cuda.cudaGetLastError()  # else the next kernel would be blamed
        raise RuntimeError(f"{code.name} of CUDA")
    return found[0] if found else None


def _machine() -> bytes:
    """The same bytes for the processes of one machine that see each other, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    said = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    return hashlib.sha256(said.encode()).digest()[:_MACHINE]
