"""A compile makes many objects and few cycles: what was alive before it is not searched for garbage again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def search_new_objects_alone(function: Callable[P, R]) -> Callable[P, R]:
    """While the function runs, the garbage collector looks at the objects made meanwhile and leaves older ones aside.

    Where it was told to set objects aside already, nothing is changed.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if gc.get_freeze_count():
            return function(*args, **kwargs)
        gc.freeze()
        try:
            return function(*args, **kwargs)
        finally:
            gc.unfreeze()

    return run
