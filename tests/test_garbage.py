"""A compile searches less for garbage, and leaves the collector as it found it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fuseline.runtime.garbage import rarely_searched_for_garbage


@pytest.fixture
def aside() -> Iterator[None]:
    """The tests set objects aside themselves; they do so again afterwards."""
    yield
    gc.freeze()


@rarely_searched_for_garbage
def state() -> tuple[int, bool]:
    return gc.get_threshold()[0], gc.get_freeze_count() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_collector_was_told_holds_again_afterwards(frozen: bool, aside: None) -> None:
    """Else objects that a server has set aside are searched again, or those of its callers never."""
    (gc.freeze if frozen else gc.unfreeze)()
    thresholds, count = gc.get_threshold(), gc.get_freeze_count()
    assert (count > 0) == frozen
    assert state() == (500_000, True)
    assert gc.get_threshold() == thresholds
    # Some of those set aside may have ended meanwhile.
    assert gc.get_freeze_count() == pytest.approx(count, rel=0.01)


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        assert state()[0] < 500_000 and not gc.isenabled()
    finally:
        gc.enable()
