"""Set up for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import PurePath
from typing import Any

import pytest
import torch
from traced import traced_anew, traced_once
from triton_interpreter import interpreter

# Files whose tests share what takes long to make: one worker runs all of each.
TOGETHER = frozenset({"test_kernels.py", "test_page.py", "test_smollm2.py"})
# Files with long tests: begun first, so that no worker is left with one of them at the end.
LONG = ("test_random_graphs.py", "test_fold.py", "test_deep_check.py", "test_decode_steps.py")

# Files about tracing itself, or that change what it does.
TRACED_ANEW = frozenset({"test_refusals.py", "test_fold.py", "test_deep_check.py"})


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def models_are_traced_once() -> Iterator[None]:
    """For all files but those of ``TRACED_ANEW``."""
    with traced_once():
        yield


@pytest.fixture(scope="module", autouse=True)
def some_are_traced_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    with traced_anew() if request.path.name in TRACED_ANEW else nullcontext():
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton kernels are interpreted: one for all tests of a worker, as to start it takes seconds."""
    with interpreter() as made:
        yield made


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup``: files of ``TOGETHER`` first, each on one worker, then test by test.

    (The mark ``xdist_group`` has no effect under pytest 9.2 with pytest-xdist 3.8.)
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if PurePath(file).name in TOGETHER else nodeid

    return Grouped(config, log)
