"""A process in which Triton kernels are interpreted, beside a test process in which they can be compiled.

Triton decides at import which of the two it does, so one process cannot do both.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Functions of a test module, submitted to this pool, run with TRITON_INTERPRET=1."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        yield pool
