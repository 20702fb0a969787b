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

    What it was told before holds again afterwards: where it is switched off, it is left alone, and what others had it
    set aside stays there.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        thresholds = gc.get_threshold()
        if not gc.isenabled() or not thresholds[0]:
            return function(*args, **kwargs)
        aside = gc.get_freeze_count() > 0
        if not aside:
            gc.freeze()
        gc.set_threshold(max(_YOUNG, thresholds[0]), *thresholds[1:])
        try:
            return function(*args, **kwargs)
        finally:
            gc.set_threshold(*thresholds)
            if not aside:
                gc.unfreeze()

    return run
