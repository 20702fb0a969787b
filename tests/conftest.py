"""Set up for all tests."""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Share the cores among the workers: threads that wait for a core cost more than they bring."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
