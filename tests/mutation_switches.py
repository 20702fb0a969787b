"""How a seeded compiler bug is switched on: a rule, a pass, a kernel or a printer says something else meanwhile."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pytest import MonkeyPatch

from fuseline import passes
from fuseline.codegen import expressions, grouped_linear, kernels, paged_attention, paged_attention_cache
from fuseline.passes.pattern import read_pattern

Switch = Callable[[MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """One bug. ``block`` is the block size of the KV cache that it is looked for with."""

    family: str
    blamed: str
    switch: Switch
    block: int = 16


def edited(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A copy of a module whose source has each first text replaced by the second, everywhere."""
    source = inspect.getsource(module)
    for old, new in changes:
        assert old in source, f"{module.__name__} holds no {old!r}"
        source = source.replace(old, new)
    twin = ModuleType(module.__name__)
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    known = sys.modules[module.__name__]
    try:
        sys.modules[module.__name__] = twin  # dataclasses look their module up
        exec(compile(source, str(module.__file__), "exec"), twin.__dict__)
    finally:
        sys.modules[module.__name__] = known
    return twin


def after(name: str, pattern: Callable[..., Any], when: object = ...) -> Switch:
    """A rule puts something else in place of what it finds."""

    def switch(patch: MonkeyPatch) -> None:
        rule: Any = passes.PASSES[name]
        changed = replace(rule, after=read_pattern(pattern), when=rule.when if when is ... else when)
        patch.setitem(passes.PASSES._passes, name, changed)

    return switch


def in_pass(name: str, module: ModuleType, old: str, new: str) -> Switch:
    """A line of a pass says something else."""
    function = passes.PASSES[name].__name__  # type: ignore[attr-defined]
    return lambda patch: patch.setitem(passes.PASSES._passes, name, getattr(edited(module, (old, new)), function))


def in_kernels(function: str, *changes: tuple[str, str]) -> Switch:
    """The text of all kernels of a kind says something else."""

    def switch(patch: MonkeyPatch) -> None:
        original = getattr(kernels, function)

        def wrong(*args: Any) -> str:
            text: str = original(*args)
            for old, new in changes:
                text = text.replace(old, new)
            return text

        patch.setattr(kernels, function, wrong)

    return switch


def in_printer(module: ModuleType, owner: str, method: str, old: str, new: str) -> Switch:
    """A method that prints a part of a kernel says something else."""
    return lambda patch: patch.setattr(
        getattr(module, owner), method, vars(getattr(edited(module, (old, new)), owner))[method]
    )


def in_helper(name: str, old: str, new: str) -> Switch:
    """A function that kernels call says something else."""
    assert old in expressions.HELPERS[name]
    return lambda patch: patch.setitem(expressions.HELPERS, name, expressions.HELPERS[name].replace(old, new))


def in_attention(old: str, new: str) -> Switch:
    """A line of the attention kernels says something else."""
    module, name = (
        (paged_attention, "TEMPLATE") if old in paged_attention.TEMPLATE else (paged_attention_cache, "NUMBERS")
    )
    assert old in getattr(module, name), old
    return lambda patch: patch.setattr(module, name, getattr(module, name).replace(old, new))


def in_experts(old: str, new: str) -> Switch:
    """A line of the kernels of experts says something else."""
    assert old in grouped_linear.TEMPLATE, old
    return lambda patch: patch.setattr(grouped_linear, "TEMPLATE", grouped_linear.TEMPLATE.replace(old, new))
