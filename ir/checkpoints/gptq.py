"""The layout of GPTQ: words along the inputs, factors and zero points by group and output.

``qweight i32[K * bits / 32, N]``, ``scales [groups, N]``, ``qzeros i32[groups, N * bits / 32]``, ``g_idx i32[K]``: the
group of each input. Zero points are stored less one, unless ``checkpoint_format`` is ``gptq_v2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .files import Tensors
from .held import Codes, Held, integer_scheme, order_of, unsupported
from .words import unpacked


def held(config: Mapping[str, Any], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Held]:
    """The rounded matrices by module.

    Raises:
        UnsupportedModelError: one of them is held in a way that there is no scheme for.
    """
    kind = config.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise unsupported("weights", f"GPTQ's checkpoint_format {kind!r} is not known; gptq and gptq_v2 are")
    less = 0 if kind == "gptq_v2" else 1
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    bits = {module: _bits(module, tensors, shapes) for module in modules}
    symmetric = bool(config.get("sym", True)) and all(
        bool((_zeros(module, bits[module], less, tensors) == 1 << bits[module] - 1).all()) for module in modules
    )
    found = {}
    for module in modules:
        depth, groups = shapes[f"{module}.weight"][1], tensors.shape(f"{module}.scales")[0]
        scheme = integer_scheme(module, bits[module], depth, groups, not symmetric)
        order = order_of(module, tensors[f"{module}.g_idx"], groups) if f"{module}.g_idx" in tensors else None
        found[module] = Held(scheme, partial(_read, module, bits[module], less, symmetric, tensors), order)
    return found


def _bits(module: str, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The bits of a code: some modules may have others than the config says."""
    words, columns = tensors.shape(f"{module}.qweight")
    rows, depth = shapes.get(f"{module}.weight", (0, 0))
    if rows != columns or not depth:
        raise unsupported(module, f"it has {columns} outputs, the model's has {rows}")
    return 32 * words // depth


def _zeros(module: str, bits: int, less: int, tensors: Tensors) -> torch.Tensor:
    """Zero points ``[groups, N]``; they wrap around like the words they were stored in."""
    stored = unpacked(tensors[f"{module}.qzeros"], bits, 1)
    return stored + less & (1 << bits) - 1


def _read(module: str, bits: int, less: int, symmetric: bool, tensors: Tensors) -> Codes:
    codes = unpacked(tensors[f"{module}.qweight"], bits, 0).t()
    factors = tensors[f"{module}.scales"].t()
    if symmetric:
        return Codes(codes.short() - (1 << bits - 1), factors)
    return Codes(codes, factors, _zeros(module, bits, less, tensors).t())
