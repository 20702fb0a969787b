"""A process in which Triton kernels are interpreted, beside a test process in which they can be compiled.

Triton decides at import which of the two it does, so one process cannot do both.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from fuseline.codegen import interpreted


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Functions of a test module, submitted to this pool, run with TRITON_INTERPRET=1."""
    started = {"mp_context": get_context("spawn"), "initializer": interpreted.accept_bounds_of_loops}
    with ProcessPoolExecutor(max_workers=1, **started) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        yield pool


@contextmanager
def interpreted_by(pool: ProcessPoolExecutor, folder: Path) -> Iterator[None]:
    """Within, ``verify=True`` has kernels interpreted in the process of that pool, and those of equal text once."""
    known: dict[tuple[str, str], interpreted.Outcome] = {}

    def interpret_kernels(
        sources: Mapping[str, str], graphs: Mapping[str, str], _: float
    ) -> dict[str, interpreted.Outcome]:
        jobs = {}
        for name, source in sources.items():
            if (source, graphs[name]) not in known:
                path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
                path.write_text(source)
                jobs[name] = pool.submit(interpreted.interpret_one, str(path), graphs[name])
        known.update({(sources[name], graphs[name]): job.result() for name, job in jobs.items()})
        return {name: known[source, graphs[name]] for name, source in sources.items()}

    with mock.patch.object(interpreted, "interpret_kernels", interpret_kernels):
        yield
