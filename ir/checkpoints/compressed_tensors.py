"""The layout of compressed-tensors: reading it, and writing it.

Whole numbers that are multiplied with unrounded rows are packed along the inputs, ``weight_packed i32[N, K * bits / 32]``,
with the middle of their range added; others are ``weight i8[N, K]`` or ``f8e4m3[N, K]``. ``weight_scale [N, groups]``;
zero points are packed along the outputs, ``weight_zero_point i32[N * bits / 32, groups]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from ..quantized import unpack
from ..schemes import Scheme, scheme_of
from .files import Tensors
from .held import Codes, Held, integer_scheme, order_of, unsupported
from .words import packed, unpacked

METHOD = "compressed-tensors"
_FORMATS = frozenset("dense pack-quantized int-quantized float-quantized naive-quantized mixed-precision".split())
_BYTES = {"I8": "int", "F8_E4M3": "float"}


def outputs(tensors: Tensors) -> dict[str, int]:
    """The rounded modules, with their number of outputs.

    Raises:
        UnsupportedModelError: a weight has factors, and is not rounded.
    """
    found = {}
    for name in tensors:
        module, _, end = name.rpartition(".")
        if end == "weight" and f"{name}_scale" in tensors and tensors.dtype(name) not in _BYTES:
            raise unsupported(name, f"it is not rounded yet ({tensors.dtype(name)}), but has factors")
        if end == "weight_packed" or (end == "weight" and f"{name}_scale" in tensors):
            found[module] = tensors.shape(name)[0]
    return found


def held(config: Mapping[str, Any], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Held]:
    """The rounded matrices by module, given the shape of each.

    Raises:
        UnsupportedModelError: one of them is held in a way that there is no scheme for.
    """
    groups = list((config.get("config_groups") or {}).values())
    for what in [config, *groups]:
        if what.get("format", "dense") not in _FORMATS:
            raise UnsupportedModelError(
                f"compressed-tensors' format {what['format']!r} is not supported; give one of {', '.join(sorted(_FORMATS))}"
            )
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense" or config.get("transform_config"):
        raise UnsupportedModelError("checkpoints with sparsity or transforms are not supported; give one without them")
    found = {}
    for module, (rows, depth) in sorted(shapes.items()):
        found[module] = _held(module, _group_of(module, groups), tensors, rows, depth)
    return found


def _group_of(module: str, groups: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group of a module: one that names it, by pattern or in full, goes before one that names its class."""
    by_class: list[Mapping[str, Any]] = []
    for group in groups:
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return group
            if target.isidentifier():
                by_class.append(group)
    if len(by_class) != 1:
        raise unsupported(module, "no group, or several groups of the config are for it")
    return by_class[0]


def _held(module: str, group: Mapping[str, Any], tensors: Tensors, rows: int, depth: int) -> Held:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if group.get("output_activations"):
        raise unsupported(module, "its results are to be rounded as well")
    symmetric = bool(weights.get("symmetric", True))
    groups = _groups(module, tensors.shape(f"{module}.weight_scale"), rows)
    if inputs:
        return Held(_dynamic(module, weights, inputs, tensors, groups), partial(_plain, module, tensors))
    if f"{module}.weight_packed" not in tensors:
        if _BYTES[tensors.dtype(f"{module}.weight")] == "float" or not symmetric:
            raise unsupported(module, "of weights in bytes without rounded rows there are symmetric whole numbers only")
        return Held(integer_scheme(module, 8, depth, groups, False), partial(_plain, module, tensors))
    words, bits = tensors.shape(f"{module}.weight_packed")[1], int(weights.get("num_bits", 0))
    if bits not in (4, 8) or words != -(-depth * bits // 32):
        raise unsupported(module, f"codes of {bits} bits; there are 4 and 8")
    name, order = f"{module}.weight_g_idx", None
    if name in tensors and bool((tensors[name] >= 0).all()):  # -1 stands for none
        order = order_of(module, tensors[name], groups)
    scheme = integer_scheme(module, bits, depth, groups, not symmetric)
    return Held(scheme, partial(_read, module, bits, rows, depth, symmetric, tensors), order)


def _groups(module: str, shape: tuple[int, ...], rows: int) -> int:
    """Factors of a row, by the shape of all factors: one for all, one for a row, or several for each row."""
    if prod(shape) == 1 or shape == (rows,):
        return 1
    if len(shape) != 2 or shape[0] != rows:
        raise unsupported(module, f"factors of shape {shape} for {rows} rows: no row has its own")
    return shape[1]


def _dynamic(module: str, weights: Mapping[str, Any], inputs: Mapping[str, Any], tensors: Tensors, groups: int) -> str:
    """The scheme of a module whose rows are rounded as well."""
    kinds = {str(weights.get("type", "int")), str(inputs.get("type", "int"))}
    by_token = inputs.get("dynamic") is True and inputs.get("strategy") == "token"
    if not by_token or groups != 1 or inputs.get("num_bits") != 8:
        raise unsupported(
            module,
            "rows of 8 bits are rounded with a factor for each token, found when they are there; not "
            f"strategy {inputs.get('strategy')!r} with dynamic {inputs.get('dynamic')}",
        )
    symmetric = weights.get("symmetric", True) and inputs.get("symmetric", True)
    if not symmetric or f"{module}.weight" not in tensors:
        raise unsupported(module, "weights and rows in bytes must be symmetric")
    kind = _BYTES[tensors.dtype(f"{module}.weight")]
    if kinds != {kind}:
        raise unsupported(module, f"weights and rows are of different kinds: {', '.join(sorted(kinds | {kind}))}")
    return "fp8" if kind == "float" else "int8d"


def _plain(module: str, tensors: Tensors) -> Codes:
    codes = tensors[f"{module}.weight"]
    return Codes(codes.float() if codes.is_floating_point() else codes, tensors[f"{module}.weight_scale"])


def _read(module: str, bits: int, rows: int, depth: int, symmetric: bool, tensors: Tensors) -> Codes:
    codes = unpacked(tensors[f"{module}.weight_packed"], bits, 1)[:, :depth]
    factors = tensors[f"{module}.weight_scale"]
    if symmetric:
        return Codes(codes.short() - (1 << bits - 1), factors)
    zeros = tensors[f"{module}.weight_zero_point"]
    # Early versions left zero points in bytes.
    plain = zeros.short() + (1 << bits - 1) if tensors.dtype(f"{module}.weight_zero_point") == "I8" else None
    return Codes(codes, factors, unpacked(zeros, bits, 0)[:rows] if plain is None else plain)


def written(module: str, rows: Tensor, scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors that hold a matrix of that shape, given as packed rows."""
    codes, factors, zeros = unpack(rows, scheme, shape[1])
    if scheme.dynamic:
        return {f"{module}.weight": codes.contiguous(), f"{module}.weight_scale": factors.contiguous()}
    middle = 0 if scheme.zeros else scheme.middle
    found = {
        f"{module}.weight_packed": packed(codes.short() + middle, scheme.bits, 1),
        f"{module}.weight_scale": factors.contiguous(),
        f"{module}.weight_shape": factors.new_tensor(shape).long(),
    }
    if zeros is not None:
        found[f"{module}.weight_zero_point"] = packed(zeros, scheme.bits, 0)
    return found


def config_of(schemes: Mapping[str, str], others: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with modules in schemes, by name; ``others`` are its other linear layers."""
    used = sorted(set(schemes.values()))
    formats = {name: _format(name) for name in used}
    groups = {}
    for number, name in enumerate(used):
        # One scheme is for the class; which modules have which of several is said name by name.
        targets = ["Linear"] if len(used) == 1 else [module for module in schemes if schemes[module] == name]
        groups[f"group_{number}"] = {"targets": targets, "format": formats[name], **_arguments(name)}
    whole = set(formats.values())
    return {
        "quant_method": METHOD,
        "format": whole.pop() if len(whole) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(others),
        "kv_cache_scheme": None,
    }


def _format(name: str) -> str:
    scheme = scheme_of(name)
    assert scheme is not None
    return "pack-quantized" if not scheme.dynamic else "float-quantized" if scheme.floats else "int-quantized"


def _arguments(name: str) -> dict[str, Any]:
    scheme = scheme_of(name)
    assert scheme is not None
    both = {"num_bits": scheme.bits, "type": "float" if scheme.floats else "int", "symmetric": not scheme.zeros}
    weights = {**both, "strategy": "group" if scheme.group else "channel", "group_size": scheme.group or None}
    rows = {**both, "strategy": "token", "dynamic": True}
    return {
        "weights": {**weights, "dynamic": False},
        "input_activations": rows if scheme.dynamic else None,
        "output_activations": None,
    }
