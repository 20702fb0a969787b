"""Write kernel files to a private cache directory and load their launchers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..ir.graph import Region
from .exchange import Exchange, meeting_of, sent_by
from .gather import gather_source
from .greedy import greedy_source
from .kernels import Kernel
from .offline import load_kernel_file
from .tuning import Choices

Launch = Callable[..., None]


def cache_directory(kind: str) -> Path:
    """A directory of our own under the user's cache, readable by the user alone."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "fuseline" / kind
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def kernel_path(kernel: Kernel) -> Path:
    """The file of a kernel in the cache; written if it is not there."""
    return _written(kernel.name, kernel.source)


def _written(name: str, source: str) -> Path:
    """A file with this text in the cache. Its name covers the whole text."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = cache_directory("kernels")
    path = folder / f"{name}_{digest}.py"
    if not path.exists() or path.read_text() != source:
        replace_file(path, source)
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file at once, so that others never read half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def load_launch(kernel: Kernel, choices: Choices | None = None, exchange: Exchange | None = None) -> Launch:
    """The launcher of a kernel, called with the region's inputs and then its results; with tilings that were measured, and
    the ``exchange`` with other ranks if it meets them."""
    launch: Any = load_kernel_file(kernel_path(kernel)).launch
    order = kernel.order
    if choices is not None:
        launch = partial(launch, choices=choices)
    if exchange is not None and (meeting_of(kernel.graph) is not None or sent_by(kernel.graph) is not None):
        launch = partial(launch, ranks=exchange)

    def in_order(*values: Any) -> None:
        launch(*[values[place] for place in order])

    return launch if list(order) == sorted(order) else in_order


def load_launches(
    kernels: Sequence[Kernel], choices: Mapping[str, Choices] | None = None, exchange: Exchange | None = None
) -> dict[Region, Launch]:
    """The launcher of every kernel region; ``choices`` by the kernel's name. See ``load_launch``."""
    found = {}
    for kernel in kernels:
        launch = load_launch(kernel, (choices or {}).get(kernel.name), exchange)
        found.update(dict.fromkeys(kernel.regions, launch))
    return found


def load_greedy(ranks: int = 1) -> Callable[..., bool | None]:
    """``launch`` of the kernel that chooses the most likely tokens, for so many ranks: see ``greedy_source``."""
    name = "greedy" if ranks == 1 else f"greedy_{ranks}"
    return load_kernel_file(_written(name, greedy_source(ranks))).launch  # type: ignore[no-any-return]


def load_gather(ranks: int) -> Callable[..., bool]:
    """``launch(x, whole, exchange)`` of the kernel that gathers the columns of so many ranks."""
    return load_kernel_file(_written(f"gather_{ranks}", gather_source(ranks))).launch  # type: ignore[no-any-return]
