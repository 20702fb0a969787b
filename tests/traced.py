"""Models that are traced once for many compiles: of what a compile takes in tests, tracing is most."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fuseline.ir.capture import capture
from fuseline.ir.graph import Graph
from fuseline.ir.rope import fix_frequencies
from fuseline.ir.rounded_weights import alike, state_rounded
from fuseline.ir.skeleton import Skeleton
from fuseline.ir.verify import verify
from fuseline.runtime import lower

# By all that a trace depends on.
_KNOWN: dict[tuple[Any, ...], Graph] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, of all compiles of models that are alike the first one traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "capture", traced)
        yield


@contextmanager
def traced_anew() -> Iterator[None]:
    """Inside, each compile traces its model itself: for tests of tracing, and those that change what it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "capture", capture)
        yield


def traced(
    source: Skeleton, options: dict[str, Any] | None = None, max_seq_len: int | None = None, fold: bool = False
) -> Graph:
    """What ``capture`` gives."""
    model = source.model
    if source.schemes:  # the same trace: how weights are held is stated afterwards
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        fold = fold and alike(source.schemes, source.ordered, names)
        graph = traced(replace(source, schemes={}, ordered=frozenset()), options, max_seq_len, fold)
        state_rounded(graph, source.schemes, source.ordered)
        verify(graph)
        return graph
    key = (model.config.to_json_string(), str(source.dtype), max_seq_len, fold, *_modules(model))
    if key in _KNOWN:
        fix_frequencies(model, max_seq_len)  # what a trace leaves in the model: its buffers are read later
    else:
        _KNOWN[key] = capture(source, None, max_seq_len, fold)
    graph = _KNOWN[key].copy()
    graph.options.update(options or {})
    return graph


def _modules(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What each module is and holds, but for the numbers of its parameters: two that differ may have other traces."""
    first: dict[int, str] = {}
    for where, module in model.named_modules(remove_duplicate=False):
        parameters = tuple(
            (name, tuple(item.shape), str(item.dtype), first.setdefault(id(item), f"{where}.{name}"))
            for name, item in module._parameters.items()
            if item is not None
        )
        buffers = tuple((name, _digest(item)) for name, item in module._buffers.items() if item is not None)
        hooks = tuple(tuple(held.values()) for held in (module._forward_hooks, module._forward_pre_hooks))
        own = tuple(
            (name, _fixed(value))
            for name, value in sorted(vars(module).items())
            if name[:1] != "_" and name != "name_or_path"  # where it was read says nothing of what it is
        )
        yield where, type(module), parameters, buffers, hooks, own


def _digest(buffer: torch.Tensor) -> str:
    held = buffer.detach().contiguous().cpu()
    return hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _fixed(value: Any) -> Any:
    """An attribute as a part of a key: a function as itself, so that one that was put in a method's place is another."""
    if inspect.isroutine(value):
        return getattr(value, "__func__", value)
    plain = (bool, int, float, str, tuple, list, torch.dtype, type(None))
    return repr(value) if isinstance(value, plain) else type(value)
