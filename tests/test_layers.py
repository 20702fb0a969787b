"""The layers of the package: data flows one way, and each file says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "codegen": {"ir", "codegen"},
    "runtime": {"ir", "passes", "codegen", "runtime"},
}
FILES = [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).glob("*.py"))]


def imported_layers(path: Path) -> set[str]:
    """The layers of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == 2:
                found.add((node.module or node.names[0].name).partition(".")[0])
            elif node.level == 1:
                found.add(path.parent.name)
            elif (node.module or "").startswith("fuseline"):
                found.add("fuseline")
        elif isinstance(node, ast.Import):
            found |= {"fuseline" for item in node.names if item.name.partition(".")[0] == "fuseline"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_flow_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[path.parent.name]
    strays = imported_layers(path) - allowed
    assert not strays, f"{path.relative_to(ROOT)} imports {strays}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_unsafe(path: Path) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "os.system"}
