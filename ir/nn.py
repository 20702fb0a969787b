"""Fuseline's own operators, each with its reference implementation in torch.

Values of a layer are laid out as rows: ``[T, features]`` or ``[T, heads, head_dim]`` with one row for each token.
Norms, activations and rotary embedding compute in fp32 and round once, to the type of their input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import register


@register("weight")
def weight(name: str) -> Tensor:
    """A parameter or buffer of the model, by its checkpoint name."""
    raise LookupError(f"weight {name!r} has no value until the graph is loaded")


@register("const")
def const(values: list[object], dtype: torch.dtype) -> Tensor:
    """A small constant tensor written out in the graph."""
    return torch.tensor(values, dtype=dtype)


@register("cache")
def cache(role: str, layer: int) -> Tensor:
    """The keys (``"k"``) or values (``"v"``) of one layer for every slot of the KV pool: ``[C, kv_heads, head_dim]``."""
    raise LookupError(f"the {role} cache of layer {layer} has no value until the graph is loaded")


@register("nn.lookup")
def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """The row of ``table [V, H]`` for each of ``ids``, and zeros for one that it has no row for."""
    there = (ids >= 0) & (ids < table.shape[0])
    return F.embedding(ids.where(there, 0), table).masked_fill(~there.unsqueeze(-1), 0)


@register("nn.rms_norm")
def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * scale`` over the last dim (Zhang & Sennrich 2019)."""
    if x.dtype == torch.float32:
        same = scale if scale is None or scale.dtype == torch.float32 else scale.float()
        return F.rms_norm(x, x.shape[-1:], same, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if scale is None else wide * scale.float()).to(x.dtype)


@register("nn.layer_norm")
def layer_norm(x: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`` over the last dim (Ba et al. 2016)."""
    wide = F.layer_norm(
        x.float(), x.shape[-1:], None if scale is None else scale.float(), None if bias is None else bias.float(), eps
    )
    return wide.to(x.dtype)


@register("nn.add_rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The sum ``x + residual`` and its RMS norm, with one read of each input: ``(sum, norm)``."""
    total = x + residual
    return total, rms_norm(total, scale, eps)


@register("nn.silu_mul")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, Shazeer 2020)."""
    if gate.dtype == torch.float32:
        return F.silu(gate).mul_(up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@register("nn.gelu_mul")
def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(gate) * up`` (GEGLU, Shazeer 2020); ``approximate`` is ``"none"`` (erf) or ``"tanh"``."""
    return (F.gelu(gate.float(), approximate=approximate) * up.float()).to(gate.dtype)


@register("nn.rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor, pairing: str = "half") -> Tensor:
    """Rotary embedding (Su et al. 2021) of ``x [..., T, heads, D]`` by ``cos`` and ``sin [..., T, R]``, ``R <= D``.

    The first ``R`` features are rotated, the others pass. ``pairing`` says which features form a pair: feature ``i``
    with ``i + R/2`` (``"half"``), or ``2i`` with ``2i + 1`` (``"interleaved"``).
    """
    width = cos.shape[-1]
    turned = (x if width == x.shape[-1] else x[..., :width]).float()
    # Each half is written in place: a rotated copy of x would cost two more passes over memory.
    out = torch.empty_like(turned)
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    (low, high), (c_low, c_high), (s_low, s_high), (out_low, out_high) = (
        item.chunk(2, -1) if pairing == "half" else (item[..., ::2], item[..., 1::2]) for item in (turned, c, s, out)
    )
    torch.mul(low, c_low, out=out_low).addcmul_(high, s_low, value=-1)
    torch.mul(high, c_high, out=out_high).addcmul_(low, s_high)
    out = out.to(x.dtype)
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), -1)


@register("nn.grouped_linear")
def grouped_linear(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    experts: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer whose weight each row chooses: mixture-of-experts projections.

    Args:
        x: ``[T, K]``, or ``[T, J, K]`` with a row of its own for each choice.
        ids: ``i64 [T, J]``, the experts that each token goes to. A row that goes to none of them (below 0, or ``E`` and
            more) is zeros.
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; bias: ``[E, N]``.
        experts: how many there are to choose from if a rank has ``E`` of them. It changes no result, and says how many rows
            are to be expected.
        dtype: the type of the result, that of ``x`` if it is ``None``. Of rows and weights that are both in codes, codes are
            multiplied, as in ``nn.scaled_linear``.

    Returns:
        ``[T, J, N]``.
    """
    width, dtype = weight.shape[-1] if transposed else weight.shape[-2], dtype or x.dtype
    if x.device.type == "meta":
        return x.new_empty((*ids.shape, width), dtype=dtype)

    def product(expert: int, rows: Tensor) -> Tensor:
        matrix = weight[expert].t() if transposed else weight[expert]
        return F.linear(rows, matrix, None if bias is None else bias[expert].to(rows.dtype))

    return by_expert(x, ids, len(weight), width, dtype, product)


def by_expert(
    x: Tensor, ids: Tensor, experts: int, width: int, dtype: torch.dtype, product: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """``[T, J, width]`` in ``dtype``: what ``product`` makes, for each of the experts that is chosen, of the rows
    ``[pairs, K]`` that chose it.

    ``x`` and ``ids`` are those of ``grouped_linear``.
    """
    out = x.new_empty((*ids.shape, width), dtype=dtype)
    pairs = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, ids.shape[1], -1)
    for expert in torch.unique(ids).tolist():
        chosen = ids == expert
        out[chosen] = product(expert, pairs[chosen]).to(dtype) if 0 <= expert < experts else 0
    return out
