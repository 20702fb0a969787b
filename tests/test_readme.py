"""The README is true: its map names every file of the package, and the command it gives for the tests is the one CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


FOLDERS = "ir ir/checkpoints passes codegen runtime runtime/bench runtime/calibration runtime/evaluation".split()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_map_names_every_file_once(folder: str) -> None:
    section = README.split(f"**`{folder}/`")[1].split("\n**`")[0]
    named = sorted(re.findall(r"`(\w+\.py)`", section))
    assert named == sorted(path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")


def test_files_that_are_mentioned_exist() -> None:
    mentioned = set(re.findall(r"`((?:ir|passes|codegen|runtime|tests|benchmarks)/[\w/]+\.py)", README))
    assert mentioned
    assert not [name for name in mentioned if not (ROOT / name).is_file()]


def test_ci_runs_the_command_of_the_readme() -> None:
    commands = re.findall(r"```bash\n(python3 -m venv .*)\n```", README)
    assert len(commands) == 2
    assert "fuseline run" in commands[0]
    assert commands[1].endswith("-m pytest -n 2 --dist loadgroup")
    # What CI looks for is this line and no other.
    assert next(line for line in README.splitlines() if "pytest -n" in line) == commands[1]
    assert "grep -m 1 'pytest -n' README.md" in (ROOT / ".ci" / "run").read_text()
