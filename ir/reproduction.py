"""Where the reproduction of a mismatch is written: a text of a graph, and a pytest file that reads it and fails."""

from __future__ import annotations

import tempfile
from pathlib import Path

FOLDER = "fuseline-verification"


def write_reproduction(folder: Path | None, stem: str, text: str, test: str) -> tuple[Path, Path]:
    """Write ``<stem>.txt`` and ``test_<stem>.py``, over files of these names.

    The folder is ``fuseline-verification/`` in the current directory if none is given, and a temporary one where that
    cannot be written.
    """
    place = _writable(Path(FOLDER) if folder is None else folder)
    files = place / f"{stem}.txt", place / f"test_{stem}.py"
    for path, content in zip(files, (text, test)):
        path.write_text(content)
    return files


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{FOLDER}-"))
