"""Equal layers are traced once: a deep model is captured with a few of its layers, of which the middle ones stand for many.

A model is folded only if its layers are alike in structure with some period, and if its own forward does the same in
each of them: every operator, every literal and where every operand comes from is compared, over the whole depth.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from . import hooks

# Layers of a period, and layers before the first one, that are tried.
_PERIODS = range(1, 9)
_STARTS = range(5)
# Attributes that hold a layer's own place among the layers.
_OWN_INDEX = frozenset({"layer_idx", "layer_index", "layer_id", "layer_number", "idx"})
# A tensor without a source counts as a literal up to so many numbers.
_LITERAL = 64
_MODULE_INTERNALS = frozenset(vars(torch.nn.Module()))


@dataclass(frozen=True)
class Fold:
    """``traced`` of ``layers`` layers are traced; the last three times ``period`` of them are alike."""

    layers: int
    period: int
    traced: int


def find_fold(model: Any, run: Callable[[], object], mode: FakeTensorMode) -> Fold | None:
    """How a model with fake parameters can be folded; nothing if its layers are few, or not alike.

    ``run()`` calls the model on a short prompt.
    """
    stack = _stack(model)
    if stack is None:
        return None
    layers = list(stack[1])
    lists = [value for value in vars(model.config.get_text_config()).values() if _is_list(value, len(layers))]
    signatures = [
        (_signature(layer, index), [repr(item[index]) for item in lists]) for index, layer in enumerate(layers)
    ]
    fold = _period_of(signatures)
    if fold is None:
        return None
    doings = _record(layers, run, mode)
    second = fold.traced - 2 * fold.period
    alike = all(doings[i] == doings[i + fold.period] for i in range(second, fold.layers - fold.period))
    return fold if alike else None


@contextmanager
def shortened(model: Any, fold: Fold) -> Iterator[None]:
    """The model with its first ``fold.traced`` layers alone, while the context is open."""
    stack = _stack(model)
    assert stack is not None
    where, whole = stack
    parent, _, name = where.rpartition(".")
    owner, config = model.get_submodule(parent), model.config.get_text_config()
    owner._modules[name] = torch.nn.ModuleList(list(whole)[: fold.traced])
    try:
        config.num_hidden_layers = fold.traced
        yield
    finally:
        owner._modules[name] = whole
        config.num_hidden_layers = fold.layers


def _stack(model: Any) -> tuple[str, torch.nn.ModuleList] | None:
    """The one list of all layers, with its path."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (where, module)
        for where, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return found[0] if len(found) == 1 else None


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _period_of(signatures: list[Any]) -> Fold | None:
    """The fold that traces the fewest layers."""
    count = len(signatures)
    found = []
    for period in _PERIODS:
        for start in _STARTS:
            traced = start + (count - start) % period + 3 * period
            if traced < count and all(signatures[i] == signatures[i + period] for i in range(start, count - period)):
                found.append(Fold(count, period, traced))
                break
    return min(found, key=lambda fold: fold.traced, default=None)


def _signature(layer: torch.nn.Module, index: int) -> list[Any]:
    """All that a layer is made of, its values of parameters apart."""
    parts: list[Any] = []
    for path, module in layer.named_modules():
        parts.append((path, type(module)))
        for name, item in module._parameters.items():
            parts.append((name, None if item is None else (tuple(item.shape), item.dtype)))
        for name, value in module._buffers.items():
            parts.append((name, None if value is None else (value.dtype, value.tolist())))
        for name, value in vars(module).items():
            if name not in _MODULE_INTERNALS:
                own = name in _OWN_INDEX and value == index
                parts.append((name, "its own index" if own else _plain(value)))
    return parts


def _plain(value: Any) -> Any:
    """Something that is equal for equal plain values; other objects count as equal if they are the same one."""
    if isinstance(value, (list, tuple)):
        return [type(value), *map(_plain, value)]
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, functools.partial):
        return [id(value.func), _plain(value.args), _plain(value.keywords)]
    if inspect.ismethod(value):
        return id(value.__func__)
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return (type(value), repr(value)) if plain else id(value)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what each layer does: operators, literals, and where each operand comes from."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.doings: list[list[Any]] = [[] for _ in layers]
        self.at: int | None = None
        self._origin: dict[int, tuple[int | None, Any]] = {}
        self._alive: list[Any] = []  # the identity of a tensor is its address, which must not be used again
        for index, layer in enumerate(layers):
            for name, item in [*layer.named_parameters(), *layer.named_buffers()]:
                self._origin.setdefault(id(item), (index, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [item for item in tree_leaves(out) if isinstance(item, torch.Tensor)]
        count = len(self._origin)
        if self.at is not None:
            doing = self.doings[self.at]
            # The number of an attention call is the layer's own index, too.
            literals = args[:5] + args[6:] if str(func) == "fuseline.attention.default" else args
            doing.append((str(func), [self._label(item) for item in tree_leaves((literals, kwargs or {}))]))
            count = len(doing)
        for place, item in enumerate(results):
            self._alive.append(item)
            self._origin[id(item)] = (self.at, (count, place))
        return out

    def _label(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return (type(value), repr(value))
        if id(value) not in self._origin and not isinstance(value, FakeTensor) and value.numel() <= _LITERAL:
            with _disable_current_modes():  # a tensor that the code writes out, as torch.tensor(0.0) does
                return value.tolist(), value.dtype
        layer, name = self._origin.get(id(value), (None, id(value)))
        back = None if layer is None or self.at is None else self.at - layer
        return back, name, tuple(map(str, value.shape)), value.dtype


def _record(layers: list[torch.nn.Module], run: Callable[[], object], mode: FakeTensorMode) -> list[list[Any]]:
    recorder = _Recorder(layers)
    handles: list[Any] = []

    def entered(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            recorder.at = index

        return hook

    def left(*_: Any) -> None:
        recorder.at = None

    for index, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(entered(index)), layer.register_forward_hook(left)]
    try:
        with torch.no_grad(), hooks.recording(), mode, recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.doings
