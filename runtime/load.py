"""``load``: a compiled engine from a directory."""

from __future__ import annotations

from pathlib import Path

from .compiled import CompiledModel
from .options import OptionError


def load(directory: str | Path) -> CompiledModel:
    """Not available yet.

    Raises:
        OptionError: always, until engines can be saved.
    """
    raise OptionError(f"{directory}: loading a saved engine is not available yet; use fuseline.compile")
