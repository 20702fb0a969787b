"""Compile kernels ahead in other processes, which leave them in Triton's cache.

Most of Triton's compiler is Python, of which a process runs one thread at a time: many processes compile many tilings in
the time of a few. They only ever fill the cache: who launches a kernel that is not there compiles it, as always.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import compiler_process

_MOST = 16
"""Processes at most; each takes some hundred megabytes."""


@dataclass(frozen=True)
class Wanted:
    """A kernel of a module that was loaded from a file, and Triton's account, as JSON, of what it is compiled for."""

    module: str
    kernel: str
    specialisation: str


def wanted_by(launch: Callable[[], Any]) -> list[Wanted]:
    """What ``launch()`` would compile. None of it is compiled, and no kernel is launched that was not compiled before."""
    with _noted() as found:
        launch()
    return found


@contextmanager
def _noted() -> Iterator[list[Wanted]]:
    from triton import knobs

    found: list[Wanted] = []

    def note(**event: Any) -> bool:
        about = event["fn"]
        found.append(Wanted(about.module, about.name, event["compile"]["specialization_data"]))
        return True  # go no further

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


@contextmanager
def _on_any_core() -> Iterator[None]:
    # Of the threads of a process, this one alone moves; what it starts goes with it.
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Compilers:
    """Processes that compile for the current GPU. They end with the ``with`` block."""

    def __init__(self, share: int = 1, bound: bool = False) -> None:
        """``share``: how many compile on this machine at the same time. ``bound``: a launcher has bound this process to a
        core or two of its own, which is not meant for what it starts."""
        self._command = [sys.executable, "-P", str(Path(compiler_process.__file__)), json.dumps(self._target())]
        self._environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with _on_any_core() if bound else nullcontext():
            count = max(1, min(_MOST, len(os.sched_getaffinity(0)) // share))
            self.processes = [self._started() for _ in range(count)]
        self._own, self._fresh = threading.local(), list(self.processes)
        self._threads = ThreadPoolExecutor(count, initializer=self._take)
        self._asked: dict[Wanted, Future[bool]] = {}

    def compile(self, wanted: Wanted) -> Future[bool]:
        """Whether it is in the cache, as soon as that is known. Nothing is asked for twice."""
        if wanted not in self._asked:
            path = sys.modules[wanted.module].__file__
            line = json.dumps([wanted.module, path, wanted.kernel, wanted.specialisation])
            self._asked[wanted] = self._threads.submit(self._ask, line)
        return self._asked[wanted]

    @staticmethod
    def _target() -> list[Any]:
        from triton.runtime.driver import driver

        gpu = driver.active.get_current_target()
        return [gpu.backend, gpu.arch, gpu.warp_size]

    def _started(self) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(self._command, env=self._environment, text=True, **pipes)

    def _take(self) -> None:
        self._own.process = self._fresh.pop()

    def _ask(self, line: str) -> bool:
        process = self._own.process
        with suppress(OSError):  # it has ended
            print(line, file=process.stdin, flush=True)
            return bool(process.stdout.readline() == compiler_process.DONE)
        return False

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.communicate()
