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


def outputs(tensors: Tensors) -> dict[str, int]:
    """The rounded modules, with their number of outputs."""
    return {name.removesuffix(".qweight"): tensors.shape(name)[1] for name in tensors if name.endswith(".qweight")}


def held(config: Mapping[str, Any], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Held]:
    """The rounded matrices by module, given the shape of each.

    Raises:
        UnsupportedModelError: one of them is held in a way that there is no scheme for.
    """
    kind = config.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise unsupported("weights", f"GPTQ's checkpoint_format {kind!r} is not known; gptq and gptq_v2 are")
    less = 0 if kind == "gptq_v2" else 1
    # Some modules may have other bits than the config says.
    depths = {module: depth for module, (_, depth) in shapes.items()}
    bits = {module: 32 * tensors.shape(f"{module}.qweight")[0] // depth for module, depth in depths.items()}
    symmetric = bool(config.get("sym", True)) and all(
        bool((_zeros(module, bits[module], less, tensors) == 1 << bits[module] - 1).all()) for module in depths
    )
    found = {}
    for module, depth in depths.items():
        groups = tensors.shape(f"{module}.scales")[0]
        scheme = integer_scheme(module, bits[module], depth, groups, not symmetric)
        order = order_of(module, tensors[f"{module}.g_idx"], groups) if f"{module}.g_idx" in tensors else None
        found[module] = Held(scheme, partial(_read, module, bits[module], less, symmetric, tensors), order)
    return found


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
