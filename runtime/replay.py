"""Ways to run a decode step on static inputs: as plain calls, or as a CUDA graph recorded once for each size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

Compute = Callable[[int], None]
"""Computes a decode step of so many sequences on inputs at fixed addresses, without waiting for the device."""

Replay = Callable[[int], None]
"""Does what ``Compute`` does for one of the sizes that it was made for."""


class NotCapturable(Exception):
    """A step cannot be recorded as a CUDA graph; says which operator stands in the way."""


class GraphReplay:
    """Replays CUDA graphs of ``compute``, one for each of ``sizes``; all share one pool of memory.

    Args:
        stream: what they are recorded on, by default one of their own. Libraries keep a workspace for every stream that
            they ever worked on: who records often should give the same.

    Raises:
        NotCapturable: some operator makes the host wait for the device, or cannot be recorded. Nothing is left behind.
    """

    def __init__(
        self, compute: Compute, sizes: Sequence[int], device: torch.device, stream: torch.cuda.Stream | None = None
    ) -> None:
        stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The largest first: the others then find their memory in the pool.
        order = sorted(sizes, reverse=True)
        _warm_up(compute, order, stream)
        _rehearse(compute, order[0], stream)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        try:
            for size in order:
                self._graphs[size] = _record(compute, size, stream, self._pool)
        except BaseException:
            self.close()
            raise

    def __call__(self, size: int) -> None:
        self._graphs[size].replay()

    def close(self) -> None:
        """Let go of the graphs: none can be replayed any more, and what they hold on to ends."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def memory(self) -> int:
        """Bytes of the pool: no other use can be made of them."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(item["total_size"] for item in segments if tuple(item["segment_pool_id"]) == tuple(self._pool))


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on ``stream``, after what was asked for before and before what is asked for later."""
    outer = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


def _warm_up(compute: Compute, sizes: Sequence[int], stream: torch.cuda.Stream) -> None:
    """Run every size once: kernels are compiled and tuned now, and libraries take their workspaces."""
    with _on(stream):
        for size in sizes:
            compute(size)
    torch.cuda.synchronize(stream.device)


def _rehearse(compute: Compute, size: int, stream: torch.cuda.Stream) -> None:
    """Run one size with every wait of the host being an error: cheaper to leave than a broken recording."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with _on(stream):
            compute(size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotCapturable(_reason(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _record(compute: Compute, size: int, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    outer = torch.cuda.current_stream(stream.device)
    try:
        # Threads of other libraries may do as they like meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            compute(size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # What ends a recording that went wrong raises too, before it has put the stream back.
        torch.cuda.set_stream(outer)
        _forsake(pool, stream.device)
        # The first error says which operator; those while ending the recording follow from it.
        first: BaseException = error
        while isinstance(first.__context__, RuntimeError):
            first = first.__context__
        graph.reset()
        torch.cuda.synchronize(stream.device)
        raise NotCapturable(_reason(first)) from error
    return graph


def _forsake(pool: Any, device: torch.device) -> None:
    """Take a recording that could not be ended out of the books of torch's allocator, where it would stay for ever."""
    with suppress(RuntimeError):  # it got as far as that by itself
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def _reason(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return f"{'; '.join(notes) or 'a step'}: {str(error).strip().partition(chr(10))[0]}"
