"""What weights are calibrated on: windows of tokens, of a text or given as they are."""

from __future__ import annotations

import ast
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models import tokenizer_of
from ..options import OptionError, positive

# Characters of a text that are enough for a token.
_CHARACTERS = 8


@dataclass(frozen=True)
class Calibration:
    """Text that the rounding of weights heeds: ``windows`` runs of ``length`` tokens (at most
    ``max_seq_len``), drawn by ``seed``.

    ``text`` is a text file, or lists of tokens, which are taken as they are; by default sources of Python's library, and as
    much again of what its modules say of themselves: rounding by code alone makes prose worse.
    """

    text: str | Path | Sequence[Sequence[int]] | None = None
    windows: int = 64
    length: int = 512
    seed: int = 0


def windows_of(wanted: Calibration, model: object, vocab_size: int, max_length: int) -> list[list[int]]:
    """The windows of tokens; ``model`` is a path or a hub id if its tokenizer is to be found there.

    Raises:
        OptionError: there is no tokenizer for a text, the text is too short, or tokens are none of the model's.
        UnsupportedModelError: no tokenizer is found there.
    """
    if wanted.text is not None and not isinstance(wanted.text, (str, Path)):
        return _checked(wanted.text, vocab_size, max_length)
    count = positive("Calibration.windows", wanted.windows)
    length = min(positive("Calibration.length", wanted.length), max_length)
    draws = random.Random(wanted.seed)
    if not isinstance(model, (str, Path)):
        raise OptionError("a model in memory has no tokenizer for a text: give Calibration(text=<lists of tokens>)")
    tokens: list[int] = tokenizer_of(str(model))(_text(wanted.text, count * length * _CHARACTERS, draws))["input_ids"]
    whole = len(tokens) // length
    if whole < count:
        raise OptionError(
            f"the calibration text has {len(tokens)} tokens, {count} windows of {length} need {count * length}: give a "
            "longer text, or fewer or shorter windows"
        )
    return [tokens[place * length : (place + 1) * length] for place in sorted(draws.sample(range(whole), count))]


def _checked(given: Sequence[Sequence[int]], vocab_size: int, max_length: int) -> list[list[int]]:
    windows = [list(window) for window in given]
    if not windows or not all(1 <= len(window) <= max_length for window in windows):
        raise OptionError(f"Calibration.text must be lists of 1 to {max_length} tokens (max_seq_len)")
    if not all(isinstance(token, int) and 0 <= token < vocab_size for window in windows for token in window):
        raise OptionError(f"Calibration.text has tokens that are none of the model's {vocab_size}")
    return windows


def _text(source: str | Path | None, enough: int, draws: random.Random) -> str:
    """A file's text, or as much as is enough of Python's library, half of it prose, its modules in drawn order."""
    if source is not None:
        try:
            return Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"Calibration.text {source}: {error}") from error
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    draws.shuffle(modules)
    sources, said = [], []
    size = told = 0
    for module in modules:
        code = module.read_text(errors="replace")
        if size < enough // 2:
            sources.append(code)
            size += len(code)
        if told < enough // 2:
            said.append(_docstrings(code))
            told += len(said[-1])
    return "\n".join(sources + said)


def _docstrings(code: str) -> str:
    """What a module, its classes and functions say of themselves; nothing if it is no code for this Python."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n\n".join(filter(None, found))
