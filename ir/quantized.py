"""Quantised matrices: rounding to nearest, and back, and products of two. See ``schemes`` for how their bytes lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .build import insert_before
from .graph import Graph, is_constant, type_of
from .infer import TypeInferenceError
from .ops import Op, aten, op_name, register
from .schemes import Scheme, scheme_of
from .types import TensorType

# As many numbers at least are rounded at a time, where there are several matrices.
_AT_ONCE = 1 << 22


def quantize(matrix: Tensor, scheme: Scheme, tries: int = 1, largest: Tensor | None = None) -> Tensor:
    """``matrix [..., N, K]``, rounded to nearest (ties to even), as ``u8 [..., N, scheme.row_bytes(K)]``.

    With ``m`` the largest magnitude of a group, its factor is ``s = m / 127`` (8 bits) or ``m / 7.5`` (4 bits), and a
    code is ``w / s``, rounded and kept within -127..127 or -8..7. For E4M3 ``s = m / 448``, and a code is the number of
    4 bits of exponent and 3 of fraction that is nearest to ``w / s`` (OCP 8-bit floating point specification, 2023).
    With zero points ``s = (max(w, 0) - min(w, 0)) / 15``, ``z = -min(w, 0) / s`` rounded, and a code is ``w / s``
    rounded, plus ``z``, within 0..15. A group of zeros has the factor 1.

    Without zero points so many factors are tried, ``s``, ``s (1 + 1 / tries)`` and so on below ``2 s``, and each group takes
    the first whose numbers have the least squared distance from its own: E4M3 is as exact with any, but not for the same
    numbers.

    ``largest f32 [..., N, 1]`` is the ``m`` of each row, of which ``matrix`` may be a part, in a dynamic scheme.
    """
    groups = _parted(matrix.float(), scheme.groups(matrix.shape[-1]))
    if largest is None:
        factors, zeros = plain_factors(groups, scheme)
    else:
        factors, zeros = _factors(largest.unsqueeze(-1), scheme.largest), None
    if tries > 1:
        factors = _best_factors(groups, factors, scheme, tries)
    codes = nearest(groups, factors, zeros, scheme)
    return pack(codes.flatten(-2), factors.squeeze(-1), None if zeros is None else zeros.squeeze(-1), scheme)


def plain_factors(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """The factors of ``groups [..., group]`` that reach their largest numbers, and their zero points: ``[..., 1]``."""
    if not scheme.zeros:
        steps = scheme.largest if scheme.bits == 8 else 7.5
        return _factors(groups.abs().amax(-1, keepdim=True), steps), None
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    factors = _factors(groups.amax(-1, keepdim=True).clamp(min=0) - low, 15)
    return factors, torch.round(-low / factors)


def nearest(numbers: Tensor, factors: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The codes nearest to numbers under factors and zero points that broadcast against them, as fp32."""
    scaled = numbers / factors
    if scheme.floats:
        return scaled.clamp(-scheme.largest, scheme.largest).to(torch.float8_e4m3fn).float()
    if zeros is not None:
        return (torch.round(scaled) + zeros).clamp(0, 15)
    least, most = (-scheme.largest, scheme.largest) if scheme.bits == 8 else (-8, 7)
    return torch.round(scaled).clamp(least, most)


def _best_factors(groups: Tensor, smallest: Tensor, scheme: Scheme, tries: int) -> Tensor:
    """The factors with which the numbers of the groups are nearest to them."""
    best, least = smallest, torch.full_like(smallest, torch.inf, dtype=torch.float64)
    for number in range(tries):
        factors = smallest * (1 + number / tries)
        numbers = nearest(groups, factors, None, scheme) * factors
        # In fp32 the order of the sum might decide between two factors.
        distance = (numbers - groups).square().sum(-1, keepdim=True, dtype=torch.float64)
        best = torch.where(distance < least, factors, best)
        least = torch.minimum(distance, least)
    return best


def _parted(value: Tensor, *parts: int) -> Tensor:
    """``value``, perhaps of no rows, with its last dim cut into so many parts, and those again."""
    return value.reshape(*value.shape[:-1], *parts, value.shape[-1] // math.prod(parts))


def _factors(spread: Tensor, steps: float) -> Tensor:
    """``spread / steps``; 1 where there is no spread.

    A number of Python's would become a multiplication with its inverse on a GPU, and the last digit decides how the
    largest weight of a group is rounded, which lies half-way between two codes.
    """
    return torch.where(spread > 0, spread / spread.new_tensor(steps), 1.0)


def pack(codes: Tensor, factors: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The bytes of codes ``[..., N, K]``, factors and zero points ``[..., N, groups]``.

    Codes are whole numbers, or numbers that E4M3 is the nearest to.
    """
    depth = codes.shape[-1]
    rows = torch.zeros((*codes.shape[:-1], scheme.row_bytes(depth)), dtype=torch.uint8, device=codes.device)
    begin, end = scheme.factors_at(depth), scheme.zeros_at(depth)
    rows[..., begin:end] = factors.float().contiguous().view(torch.uint8)
    if scheme.dynamic:
        rows[..., :depth] = codes.to(_element(scheme)).view(torch.uint8)
        return rows
    blocks = begin // (2 * scheme.run)
    whole = F.pad(codes.to(torch.int16) + scheme.middle, (0, blocks * scheme.block - depth))
    places = _parted(whole, blocks, scheme.places)
    shifts = scheme.bits * torch.arange(scheme.places, dtype=torch.int32, device=codes.device)
    words = (places.int() << shifts[:, None]).sum(-2)
    rows[..., :begin] = torch.stack((words & 255, words >> 8), -1).flatten(-3).to(torch.uint8)
    if zeros is not None:
        rows[..., end : end + zeros.shape[-1]] = zeros.to(torch.uint8)
    return rows


def unpack(rows: Tensor, scheme: Scheme, depth: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes ``[..., N, depth]`` (``i8``, or E4M3), factors ``f32 [..., N, groups]`` and zero points ``u8`` of packed rows."""
    begin, end = scheme.factors_at(depth), scheme.zeros_at(depth)
    factors = rows[..., begin:end].contiguous().view(torch.float32)
    if scheme.dynamic:
        return rows[..., :depth].view(_element(scheme)), factors, None
    zeros = rows[..., end : end + scheme.groups(depth)] if scheme.zeros else None
    halves = _parted(rows[..., :begin], begin // (2 * scheme.run), scheme.run).transpose(-1, -2)
    codes = halves.flatten(-3) if scheme.bits == 8 else torch.stack((halves & 15, halves >> 4), -2).flatten(-4)
    return (codes[..., :depth] - scheme.middle).view(torch.int8), factors, zeros


def dequantize(rows: Tensor, kind: TensorType, dtype: torch.dtype) -> Tensor:
    """The numbers that packed rows of that type stand for: ``(code - zero point) * factor``, in ``dtype``."""
    scheme = scheme_of(kind.dtype)
    assert scheme is not None
    depth = kind.shape[-1]
    assert isinstance(depth, int)
    codes, factors, zeros = unpack(rows, scheme, depth)
    wide = _parted(codes, scheme.groups(depth)).float()
    if zeros is not None:
        wide = wide - zeros.unsqueeze(-1)
    return (wide * factors.unsqueeze(-1)).flatten(-2).to(dtype)


def _element(scheme: Scheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme.floats else torch.int8


def _rounded(
    matrix: Tensor, scheme: str, tries: int = 1, divisors: Tensor | None = None, absmax: Tensor | None = None
) -> Tensor:
    """A matrix ``[..., N, K]`` in the bytes of a scheme, rounded to nearest. What reads it reads the numbers that they stand for.

    With ``divisors f32 [K]`` it is the matrix over them, in fp32, that is rounded. ``absmax f32 [..., N, parts]`` holds the
    largest magnitudes of the rows that these are parts of, part by part: codes and factors are those of the whole rows.
    """
    found = scheme_of(scheme)
    if found is None:
        raise ValueError(f"{scheme} is no scheme of quantised weights")
    matrix = matrix if divisors is None else matrix.float() / divisors
    if absmax is not None:
        return quantize(matrix, found, tries, absmax.amax(-1, keepdim=True))
    if matrix.dim() < 3:
        return quantize(matrix, found, tries)
    # Rounding takes several times the memory of what it rounds: an expert's matrix at a time, or of the rows that meet
    # experts, as many.
    count = max(1, _AT_ONCE // max(1, matrix[:1].numel()))
    return torch.cat([quantize(part, found, tries) for part in torch.split(matrix, count)])


def _type_of_rounded(
    matrix: Node, scheme: str, tries: int = 1, divisors: Node | None = None, absmax: Node | None = None
) -> TensorType:
    found, kind = scheme_of(scheme), type_of(matrix)
    if divisors is not None and (type_of(divisors).dtype, type_of(divisors).shape) != ("f32", kind.shape[-1:]):
        raise TypeInferenceError(f"the columns of {kind} cannot be divided by {type_of(divisors)}")
    if absmax is not None and not _are_of_rows(type_of(absmax), kind, found, tries):
        raise TypeInferenceError(f"{kind} cannot be rounded as {scheme} by {type_of(absmax)}")
    depth = kind.shape[-1] if kind.rank > 1 else None
    if found is None or tries < 1 or not isinstance(depth, int) or not kind.torch_dtype.is_floating_point:
        raise TypeInferenceError(f"{kind} cannot be quantised as {scheme}")
    why = found.reason_against(depth)
    if why:
        raise TypeInferenceError(why)
    return TensorType(scheme, kind.shape)


def _are_of_rows(absmax: TensorType, kind: TensorType, scheme: Scheme | None, tries: int) -> bool:
    """Whether these may be the largest magnitudes of rows that are rounded in each step."""
    return (
        scheme is not None
        and scheme.dynamic
        and tries == 1
        and kind.rank > 1
        and (absmax.dtype, absmax.shape[:-1]) == ("f32", kind.shape[:-1])
    )


quantize_op: Op = register("nn.quantize", infer_type=_type_of_rounded)(_rounded)


@register("nn.smoothing")
def smoothing(weight: Tensor) -> Tensor:
    """What each column of ``weight [N, K]`` is multiplied with, and of the rows that meet it divided by: ``f32 [K]``.

    The product stays the same, but rows with a few large columns lose less when they are rounded (SmoothQuant, Xiao et
    al. 2023). The numbers come from a calibration; without one they are 1.
    """
    return torch.ones(weight.shape[-1], dtype=torch.float32, device=weight.device)


@register("nn.scaled_linear")
def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of two quantised matrices, ``x [T, K]`` and ``weight [N, K]``, plus ``bias [N]``: ``[T, N]`` in ``dtype``.

    Codes are multiplied and summed (in fp32 or exactly); each sum gets the factors of its row and its column.
    """
    out = F.linear(x, weight)
    return (out if bias is None else out + bias.to(out.dtype)).to(dtype)


def _type_of_joined(parts: Sequence[Node]) -> TensorType:
    kinds = [type_of(part) for part in parts]
    rows, schemes = [kind.shape[0] for kind in kinds], {kind.dtype for kind in kinds}
    if len(schemes) != 1 or len({kind.shape[1:] for kind in kinds}) != 1 or not all(map(is_quantised, parts)):
        raise TypeInferenceError(f"{', '.join(map(str, kinds))} are no rows of one scheme and length")
    return TensorType(kinds[0].dtype, (sum(size for size in rows if isinstance(size, int)), *kinds[0].shape[1:]))


@register("nn.cat_rows", infer_type=_type_of_joined)
def cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of quantised matrices under each other: their bytes, as they are."""
    return torch.cat(list(parts))


def _type_of_repeated(x: Node, sizes: Sequence[int], times: Sequence[int], width: int) -> TensorType:
    kind = type_of(x)
    if (
        kind.shape[:1] != (sum(sizes),)
        or len(sizes) != len(times)
        or any(count > 1 and size % width for size, count in zip(sizes, times))
    ):
        raise TypeInferenceError(f"{kind} has no rows {list(sizes)} in units of {width}")
    return TensorType(kind.dtype, (sum(size * count for size, count in zip(sizes, times)), *kind.shape[1:]))


@register("nn.repeat_rows", infer_type=_type_of_repeated)
def repeat_rows(x: Tensor, sizes: Sequence[int], times: Sequence[int], width: int) -> Tensor:
    """Of the rows ``x [sum(sizes), ...]``, quantised ones too, each ``width`` of a section stated ``times`` in a row."""
    parts = [
        part if count == 1 else part.reshape(-1, width, *x.shape[1:]).repeat_interleave(count, 0).flatten(0, 1)
        for part, count in zip(torch.split(x, list(sizes)), times)
    ]
    return torch.cat(parts)


def quantised_inputs(node: Node) -> Iterator[Node]:
    """The operands of a node that it reads through ``dequantize``; what makes codes of codes reads their bytes."""
    return (item for item in node.all_input_nodes if is_quantised(item) and not is_quantised(node))


def is_quantised(node: Node) -> bool:
    """Whether a value is held in the bytes of a scheme."""
    kind: Any = node.meta["type"]
    return isinstance(kind, TensorType) and scheme_of(kind.dtype) is not None


def rounds_rows(graph: Graph) -> bool:
    """Whether activations are rounded: where one lies half-way between two codes, the last digit decides."""
    return any(op_name(node.target) == "nn.quantize" and not is_constant(node) for node in graph.calls())


def without_rounding(graph: Graph, rows_only: bool = False) -> Graph:
    """A copy of a graph that computes with the matrices themselves where it would with rounded ones.

    With ``rows_only`` the weights stay rounded, and only the activations are themselves.
    """
    plain = graph.copy()
    for node in list(plain.calls()):
        if op_name(node.target) == "nn.quantize" and not (rows_only and is_constant(node)):
            source = node.args[0]
            assert isinstance(source, Node)
            if len(node.args) > 3 and node.args[3] is not None:
                name = f"{node.name}_numbers"
                source = insert_before(plain, node, aten("div.Tensor"), (source, node.args[3]), name=name)
            node.replace_all_uses_with(source)
            plain.erase_node(node)
        elif op_name(node.target) == "nn.smoothing" and not rows_only:
            # Any numbers but 0 give the same product; ones would not tell whether rows or weights have them twice.
            sizes = insert_before(plain, node, aten("abs"), node.args)
            made = insert_before(plain, node, aten("amax"), (sizes, [0]))
            wide = insert_before(plain, node, aten("to.dtype"), (made, torch.float32))
            node.replace_all_uses_with(insert_before(plain, node, aten("add.Tensor"), (wide, 0.5)))
            plain.erase_node(node)
        elif op_name(node.target) == "nn.scaled_linear":
            node.target = aten("linear")
            node.args = node.args[:3] if node.args[2] is not None else node.args[:2]
        elif op_name(node.target) == "nn.grouped_linear" and len(node.args) > 6:
            node.args = node.args[:6]
    return plain
