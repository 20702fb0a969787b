"""What one process tells another that it started, as a line of JSON: numbers, text, and the few types below."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .calibration.texts import Calibration
from .options import KVCacheConfig
from .sequence import SamplingParams

_TYPES: dict[str, Any] = {f"fuseline.{kind.__name__}": kind for kind in (Calibration, KVCacheConfig, SamplingParams)}
_DTYPE = "torch.dtype"


def line_of(value: Any) -> bytes:
    """A value as a line. Raises TypeError if it holds something else."""
    return json.dumps(value, default=_plain).encode() + b"\n"


def value_of(line: bytes) -> Any:
    """The value of a line, in which sequences have become lists. Raises ValueError if it is none."""
    return json.loads(line, object_hook=_made)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, Path):
        return str(value)
    for name, kind in _TYPES.items():
        if isinstance(value, kind):
            return {name: {field.name: getattr(value, field.name) for field in fields(value)}}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is neither a number nor text")


def _made(found: dict[str, Any]) -> Any:
    value: Any
    name, value = next(iter(found.items()), ("", {}))
    if name == _DTYPE:
        return getattr(torch, value)
    if name in _TYPES:
        options = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return _TYPES[name](**options)
    return found
