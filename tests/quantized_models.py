"""Models whose rows fit the groups of quantisation, and the same with weights rounded by numpy alone.

The rounding here is written from the definition of the schemes, and shares nothing with the code under test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from families import FAMILIES, SIZES, config, randomize
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

_WIDER = {48: 96, 64: 160, 24: 64}


def wide(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family with a hidden size of 96 instead of 48."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    plain = config(family)
    sizes = {key: _WIDER[size] for key, size in SIZES.items() if size in _WIDER and getattr(plain, key, None) == size}
    made = AutoModelForCausalLM.from_config(
        config(replace(family, changes={**family.changes, **sizes})), attn_implementation="eager"
    )
    randomize(made, seed)
    return made.eval()


def rounded(matrix: np.ndarray, scheme: str, tries: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes ``[N, K]``, factors and zero points ``[N, groups]`` of a matrix ``f32 [N, K]``."""
    if scheme in ("int8-dynamic", "fp8"):
        most = np.abs(matrix).max(1, keepdims=True)
        factors = np.where(most > 0, most / np.float32(127 if scheme == "int8-dynamic" else 448), 1).astype(np.float32)
        if scheme == "int8-dynamic":
            return np.clip(np.rint(matrix / factors), -127, 127), factors, None
        # A weight takes the best of several factors, row by row.
        tried = [factors * np.float32(1 + number / tries) for number in range(tries)]
        errors = [
            np.square(nearest_e4m3(matrix / item) * item - matrix).sum(1, dtype=np.float64, keepdims=True)
            for item in tried
        ]
        factors = np.choose(np.argmin(errors, axis=0), tried)
        return nearest_e4m3(matrix / factors), factors, None
    group = int(scheme.partition("g")[2] or matrix.shape[1])
    parts = matrix.reshape(matrix.shape[0], -1, group)
    if scheme.startswith("u"):
        low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
        factors = ((high - low) / np.float32(15)).astype(np.float32)
        zeros = np.rint(-low / factors)
        codes = np.clip(np.rint(parts / factors[:, :, None]) + zeros[:, :, None], 0, 15)
        return codes.reshape(matrix.shape), factors, zeros
    steps, least, most = (127, -127, 127) if scheme.startswith("int8") else (7.5, -8, 7)
    factors = (np.abs(parts).max(2) / np.float32(steps)).astype(np.float32)
    return np.clip(np.rint(parts / factors[:, :, None]), least, most).reshape(matrix.shape), factors, None


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest numbers of a sign, 4 bits of exponent (-6 to 8) and 3 of fraction, ties to even ones, 448 at most."""
    exponents = np.maximum(np.frexp(values)[1] - 1, -6)
    steps = np.ldexp(np.float32(1), exponents - 3)
    return np.clip(np.rint(values / steps) * steps, -448, 448)


def rounded_rows(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """Activations ``[..., K]`` with each token rounded by itself."""
    rows = values.detach().cpu().numpy().reshape(-1, values.shape[-1])
    return torch.from_numpy(restored(*rounded(rows, scheme))).reshape(values.shape).to(values.device)


def restored(codes: np.ndarray, factors: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """The matrix that codes stand for."""
    parts = codes.reshape(*factors.shape, -1).astype(np.float32)
    if zeros is not None:
        parts = parts - zeros[:, :, None].astype(np.float32)
    return (parts * factors[:, :, None]).reshape(codes.shape)


def fake_quantised(
    model: PreTrainedModel, scheme: str, chosen: Callable[[str], bool] = lambda name: True
) -> PreTrainedModel:
    """A copy of a model whose projections (those in layers that ``chosen`` accepts) have the numbers of rounded weights.

    Experts are chosen by the names of their parameters, and routers are left as they are.

    They read rounded activations if the scheme is one that rounds them, too.
    """
    twin = copy.deepcopy(model)
    head = twin.get_output_embeddings()
    dynamic, tries = scheme in ("int8-dynamic", "fp8"), 16 if scheme == "fp8" else 1
    for name, module in twin.named_modules():
        weight = getattr(module, "weight", None)
        kind = type(module).__name__
        if name.endswith("experts"):
            for part, values in module.named_parameters():
                if values.dim() == 3 and chosen(f"{name}.{part}"):
                    for matrix in values.detach():
                        rows = matrix.T if module.is_transposed else matrix
                        found = torch.from_numpy(restored(*rounded(np.ascontiguousarray(rows.numpy()), scheme, tries)))
                        matrix.copy_(found.T if module.is_transposed else found)
            if dynamic:
                round_rows_of_experts(twin, name, scheme)
        if kind not in ("Linear", "Conv1D") or module is head or not chosen(name):
            continue
        rows = weight.detach().numpy().T if kind == "Conv1D" else weight.detach().numpy()
        found = restored(*rounded(np.ascontiguousarray(rows), scheme, tries))
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(found.T if kind == "Conv1D" else found)))
        if dynamic:
            module.register_forward_pre_hook(lambda _, given: (rounded_rows(given[0], scheme),))
    return twin


def round_rows_of_experts(model: PreTrainedModel, name: str, scheme: str) -> None:
    """From now on a model's experts of that name read rounded rows."""
    model.set_experts_implementation("eager")
    module = model.get_submodule(name)
    module.forward = _RoundsRows(scheme).around(module.forward)


class _RoundsRows(TorchFunctionMode):
    """Rounds the rows of every product with a matrix."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            args = (rounded_rows(args[0], self._scheme), *args[1:])
        return func(*args, **(kwargs or {}))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function within which rows are rounded."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside
