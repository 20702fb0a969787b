"""``compile`` starts the other ranks itself: processes of this machine that follow the first one call by call."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from transformers import PreTrainedModel

from ..ir.errors import FuselineError
from ..ir.graph import Graph
from ..ir.skeleton import skeleton
from .compiled import CompiledModel
from .join import join, leave, let_go, store_of_first
from .mpi import RankError
from .nccl import NCCLGroup
from .options import OptionError, positive, resolve_device
from .ranks import size_of
from .told import line_of
from .worker import END

# Seconds in which the end of a process is known to the one that started it.
_MOMENT = 0.2
# And after which what waits for it is let go.
_GRACE = 2.0


def starts_ranks(tensor_parallel: int, simulate: bool) -> bool:
    """Whether there is nobody yet to be the other ranks."""
    return (
        positive("tensor_parallel", tensor_parallel) > 1
        and not simulate
        and size_of() is None
        and not distributed.is_initialized()
    )


def compiled_on_ranks(compile: Callable[..., CompiledModel], arguments: Mapping[str, Any]) -> CompiledModel:
    """What ``compile(**arguments)`` gives on the first of the ranks, which are started for it and end with the model.

    Raises:
        OptionError: the arguments cannot be told to other processes, or there are fewer GPUs than ranks.
        RankError: another rank has ended. Else as ``compile``.
    """
    size, model = arguments["tensor_parallel"], arguments["model"]
    place = resolve_device(arguments["device"])
    if place.type == "cuda" and torch.cuda.device_count() < size:
        raise OptionError(
            f"tensor_parallel={size}: this machine has {torch.cuda.device_count()} GPUs, one for each rank"
        )
    if isinstance(arguments["weights"], Mapping):
        raise OptionError("weights from a mapping are for ranks that mpirun or torchrun starts, or with simulate=True")
    if isinstance(model, Graph):
        raise OptionError("a graph from a dump runs on ranks that mpirun or torchrun starts, or with simulate=True")
    with tempfile.TemporaryDirectory(prefix="fuseline-model-") as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            _refuse_unsaved(model, folder)
            arguments = {**arguments, "model": folder}  # all ranks read the same
        team = Team(size, {**arguments, "device": place.type, "progress": False})
        try:
            compiled = compile(**{**arguments, "device": join(team.store, 0, size, place.type)})
        except BaseException as error:
            gone = team.gone()
            # What is wrong with the model or the options is wrong on all ranks, and this one can say it best.
            own = isinstance(error, FuselineError) and not isinstance(error, RankError) and not team.let_go
            team.close(kill=True)
            if gone and not own and not isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise RankError(gone) from error
            raise
    compiled.engine.tell = team.tell
    if isinstance(compiled.engine.group, NCCLGroup):
        compiled.engine.group.gone = team.gone
    compiled.end_with(team.close)
    return compiled


def _refuse_unsaved(model: PreTrainedModel, folder: str) -> None:
    """Raise OptionError if a checkpoint of a live model would give another one: buffers may be in none."""
    saved = dict(skeleton(folder, model.dtype).model.named_buffers())
    for name, item in model.named_buffers():
        found = saved.get(name)
        if found is None or not torch.equal(found.cpu(), item.cpu().to(found.dtype)):
            raise OptionError(
                f"{name} of this {type(model).__name__} is not what its checkpoint gives, which the other ranks read (was the "
                "whole model converted to another type?): pass the path of a checkpoint, or start the ranks with mpirun"
            )


class Team:
    """The other ranks of this machine, and where all meet."""

    def __init__(self, size: int, arguments: Mapping[str, Any]) -> None:
        self.store = store_of_first(size)
        try:
            first = line_of((self.store.port, size, dict(arguments)))
        except TypeError as error:
            raise OptionError(
                f"the arguments of compile cannot be told to other processes ({error}): start the ranks with mpirun or "
                "torchrun"
            ) from error
        source = Path(__file__).parent.parent.parent
        threads = max(1, (os.cpu_count() or 1) // size)
        self._processes: list[tuple[int, subprocess.Popen[bytes], Any]] = []
        self._files = ExitStack()
        for rank in range(1, size):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
            said = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            command = [sys.executable, "-m", "fuseline.runtime.worker"]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said)
            self._processes.append((rank, process, said))
        self._size = size
        self.let_go = False
        """Whether a rank is gone, and what this process computes means nothing since."""
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_ranks, daemon=True)
        self._watch.start()
        self._say(first)

    def tell(self, name: str, *values: Any) -> None:
        """Have all do what the first rank is about to do.

        Raises:
            RankError: one has ended.
        """
        if not self._processes:
            raise RankError("the processes of the other ranks have been ended: compile the model again")
        if name == "abort_all":
            time.sleep(_MOMENT)  # perhaps because another rank has just ended
        gone = self.gone()
        if gone:
            raise RankError(gone)
        self._say(line_of((name, values)))

    def gone(self) -> str:
        """Which rank has ended, with the last that it said; empty if none has."""
        for rank, process, said in self._processes:
            if process.poll() is not None:
                text = os.pread(said.fileno(), os.fstat(said.fileno()).st_size, 0)
                lines = text.decode(errors="replace").strip().splitlines()
                last = next((line for line in reversed(lines) if line.startswith("fuseline:")), "".join(lines[-1:]))
                return f"rank {rank} of {self._size} has ended ({process.returncode}): {last or 'it said nothing'}"
        return ""

    def _watch_ranks(self) -> None:
        """Once a rank is gone, have this process wait for it no longer, wherever it does."""
        while not self._over.wait(_MOMENT):
            if self.gone():
                # What has ended that one may end this one as well, and can then be said better.
                if not self._over.wait(_GRACE):
                    self.let_go = True
                    let_go()
                return

    def close(self, kill: bool = False) -> None:
        """End the other ranks."""
        self._over.set()
        if threading.current_thread() is not self._watch:
            self._watch.join()
        with suppress(RankError):
            self._say(line_of(END))
        for _, process, _ in self._processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
            try:
                process.wait(0 if kill else 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self._files.close()
        leave()

    def _say(self, text: bytes) -> None:
        for rank, process, _ in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.write(text)
                process.stdin.flush()
            except OSError as error:
                raise RankError(self.gone() or f"rank {rank} of {self._size} does not listen: {error}") from error
