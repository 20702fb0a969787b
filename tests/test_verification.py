"""``verify=True`` finds seeded bugs and blames the right pass, and raises no false alarm."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from mutations import MUTATIONS, Mutation
from test_families import OTHERS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from triton_interpreter import shared_interpreter

import fuseline
from fuseline import ir, passes
from fuseline.codegen.kernels import emit_kernels
from fuseline.codegen.verification import verify_kernels
from fuseline.ir.capture import capture
from fuseline.ir.skeleton import skeleton

CPU = torch.device("cpu")
# Seeded bugs that are not found, each with the reason.
UNCAUGHT: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def interpreted_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_interpreter(tmp_path_factory.mktemp("kernels")):
        yield


@cache
def captured(family: str, block: int = 16, dtype: torch.dtype = torch.float32) -> ir.Graph:
    return capture(skeleton(make(family, dtype), dtype), {"kv_block": block})


@cache
def lowered(family: str, block: int = 16) -> ir.Graph:
    return passes.run(captured(family, block))


def verify_passes(graph: ir.Graph, folder: Path) -> None:
    names = passes.PASSES.pipeline
    for _ in passes.verified(graph, passes.steps(graph, names, check=True), names, folder):
        pass


def hunt(mutation: Mutation, folder: Path) -> fuseline.VerificationError | None:
    """What verification says of a seeded bug that is on: a bug in codegen leaves the passes as they are."""
    try:
        if mutation.blamed == "codegen":
            verify_kernels(emit_kernels(lowered(mutation.family, mutation.block)), CPU, folder)
        else:
            verify_passes(captured(mutation.family, mutation.block), folder)
    except fuseline.VerificationError as error:
        return error
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_bug_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    if mutation.blamed == "codegen":
        lowered(mutation.family, mutation.block)
    with monkeypatch.context() as patch:
        mutation.switch(patch)
        error = hunt(mutation, tmp_path)
    if name in UNCAUGHT:
        assert error is None, "found after all: take it off the list"
        return
    assert error is not None
    print(name, error)
    assert error.pass_name == mutation.blamed
    assert error.site and not error.error <= error.tolerance
    text, test = error.files
    assert text.parent == tmp_path and text.suffix == ".txt" and test.name == f"test_{text.stem}.py"
