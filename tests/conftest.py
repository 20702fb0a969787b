"""Set up for all tests."""

from __future__ import annotations

import gc
import os

import torch


def pytest_configure() -> None:
    """Share the cores among the workers: threads that wait for a core cost more than they bring."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_finish() -> None:
    """Search for garbage less often, and never in the modules that are loaded by now: in tests that make many small
    objects that was a fourth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
