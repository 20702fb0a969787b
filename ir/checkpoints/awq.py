"""The layout of AWQ (its ``gemm`` version): words along the outputs, in an order that its kernels like.

``qweight i32[K, N / 8]``, ``scales [groups, N]``, ``qzeros i32[groups, N / 8]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .files import Tensors
from .held import Codes, Held, integer_scheme, unsupported
from .words import unpacked

# The output that each code of a word belongs to, from the lowest bits on.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


def outputs(tensors: Tensors) -> dict[str, int]:
    """The rounded modules, with their number of outputs."""
    return {name.removesuffix(".qweight"): 8 * tensors.shape(name)[1] for name in tensors if name.endswith(".qweight")}


def held(config: Mapping[str, Any], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Held]:
    """The rounded matrices by module, given the shape of each.

    Raises:
        UnsupportedModelError: one of them is held in a way that there is no scheme for.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("bits", _BITS) != _BITS:
        raise unsupported(
            "weights", f"AWQ's version {version!r} of {config.get('bits')} bits is not known; gemm of 4 is"
        )
    found = {}
    for module, (_, wanted) in shapes.items():
        depth = tensors.shape(f"{module}.qweight")[0]
        if depth != wanted:
            raise unsupported(module, f"it has {depth} inputs, the model's has {wanted}")
        groups = tensors.shape(f"{module}.scales")[0]
        zeros = f"{module}.qzeros" in tensors
        found[module] = Held(integer_scheme(module, _BITS, depth, groups, zeros), partial(_read, module, tensors))
    return found


def _read(module: str, tensors: Tensors) -> Codes:
    codes = unpacked(tensors[f"{module}.qweight"], _BITS, 1, _ORDER).t()
    factors = tensors[f"{module}.scales"].t()
    if f"{module}.qzeros" not in tensors:
        return Codes(codes.short() - (1 << _BITS - 1), factors)
    return Codes(codes, factors, unpacked(tensors[f"{module}.qzeros"], _BITS, 1, _ORDER).t())
