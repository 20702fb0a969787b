"""Codes that become numbers of 16 bits by instructions of the GPU: what those compute, for every word."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fuseline.codegen.instructions import codes_helpers, codes_name

KINDS = {"tl.bfloat16": torch.bfloat16, "tl.float16": torch.float16}
CASES = [
    (kind, bits, middle, place)
    for kind in KINDS
    for bits, middle in ((8, 128), (4, 8), (4, 0))
    for place in range(16 // bits)
]


def instructions(helper: str) -> Iterator[tuple[str, list[str]]]:
    text = re.search(r'"\{ (.*?) \}"', helper)
    assert text is not None, helper
    for item in text[1].rstrip(";").split(";"):
        name, _, operands = item.strip().partition(" ")
        yield name, [operand.strip() for operand in operands.split(",")]


def computed(helper: str, words: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """What the instructions of a helper make of registers with two words each, as pairs of numbers."""
    registers = {"$1": words}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(words, int(name, 16 if "x" in name else 10))

    def halves(name: str) -> torch.Tensor:
        return torch.from_numpy(value(name).view(np.int16).copy()).view(kind)

    for name, (target, *sources) in instructions(helper):
        if name == ".reg":
            continue
        if name == "shr.b32":
            registers[target] = value(sources[0]) >> value(sources[1])
        elif name == "mov.b32":
            registers[target] = value(sources[0])
        elif name == "lop3.b32":
            table, inputs = int(sources[3], 16), [value(item) for item in sources[:3]]
            found = np.zeros_like(words)
            for row in range(8):
                if table >> row & 1:
                    terms = [item if row >> 2 - place & 1 else ~item for place, item in enumerate(inputs)]
                    found |= terms[0] & terms[1] & terms[2]
            registers[target] = found
        else:
            assert name == f"add.rn.{'bf16x2' if kind == torch.bfloat16 else 'f16x2'}", name
            registers[target] = (halves(sources[0]) + halves(sources[1])).view(torch.int16).numpy().view(np.uint32)
    return torch.from_numpy(registers["$0"].view(np.int16).copy()).view(kind).float().numpy()


@pytest.mark.parametrize(("kind", "bits", "middle", "place"), CASES)
def test_instructions_make_the_codes(kind: str, bits: int, middle: int, place: int) -> None:
    helper = codes_helpers()[codes_name(kind, bits, place, middle)]
    words = np.arange(1 << 16, dtype=np.uint16)
    pairs = np.stack((words, words[::-1]), 1).reshape(-1)
    found = computed(helper, pairs.view(np.uint32), KINDS[kind])
    expected = (pairs >> bits * place & (1 << bits) - 1).astype(np.float32) - middle
    assert np.array_equal(found, expected)


def test_every_helper_is_tried() -> None:
    assert {codes_name(kind, bits, place, middle) for kind, bits, middle, place in CASES} == set(codes_helpers())
