"""Progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import transformers
from tqdm import tqdm

Item = TypeVar("Item")


def quiet_transformers() -> None:
    """Keep the chatter of transformers off the terminal; errors stay."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Progress:
    """Shows what goes on, or nothing if it is not ``on``."""

    on: bool = False

    def bar(self, items: Iterable[Item], what: str, total: int | None = None) -> Generator[Item, None, None]:
        """The items, counted by a bar while they are taken."""
        yield from tqdm(items, desc=what, total=total, file=sys.stderr, disable=not self.on, leave=False)

    @contextmanager
    def line(self, what: str) -> Iterator[None]:
        """A line while something runs that cannot be counted."""
        begin = time.perf_counter()
        if self.on:
            print(f"{what} ...", end="\r", file=sys.stderr, flush=True)
        yield
        if self.on:
            print(f"{what}: {time.perf_counter() - begin:.1f} s   ", file=sys.stderr, flush=True)
