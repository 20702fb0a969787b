"""A compile makes many objects that live and few cycles: searching for garbage all the time costs a tenth of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# New objects after which garbage is searched for; Python's own choice is 700.
_YOUNG = 500_000


def rarely_searched_for_garbage(function: Callable[P, R]) -> Callable[P, R]:
    """While the function runs, the garbage collector looks seldom, and at nothing that was there before.

    What it was told before holds again afterwards. Where it is switched off, or was told to set objects aside already,
    it is left alone.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        thresholds = gc.get_threshold()
        if not gc.isenabled() or not thresholds[0] or gc.get_freeze_count():
            return function(*args, **kwargs)
        gc.freeze()
        gc.set_threshold(max(_YOUNG, thresholds[0]), *thresholds[1:])
        try:
            return function(*args, **kwargs)
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()

    return run
