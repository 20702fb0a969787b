"""Names that rule bodies are written with. Rules are read, never run, so the names only have to exist."""

from __future__ import annotations

from typing import Any

aten: Any = None
nn: Any = None
