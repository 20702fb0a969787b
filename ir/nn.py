"""Fuseline's own operators, each with its reference implementation in torch.

Values of a layer are laid out as rows: ``[T, features]`` or ``[T, heads, head_dim]`` with one row for each token.
Norms, activations and rotary embedding compute in fp32 and round once, to the type of their input.
"""

from __future__ import annotations

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
        return F.silu(gate) * up
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
    turned, passed = x[..., :width].float(), x[..., width:]
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    if pairing == "half":
        low, high = turned.chunk(2, -1)
        partner = torch.cat((-high, low), -1)
    else:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    turned = (turned * c + partner * s).to(x.dtype)
    return torch.cat((turned, passed), -1) if passed.shape[-1] else turned


@register("nn.attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    kind: str = "causal",
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence over itself: ``q [..., T, H, D]``, ``k [..., T, KV, D]``, ``v [..., T, KV, DV]``.

    ``kind`` is ``"causal"``, ``"sliding"`` (the last ``window`` tokens, the own one included) or ``"chunked"`` (the
    tokens of the same chunk of ``window``). Scores are capped to ``softcap * tanh(score / softcap)`` if it is not 0;
    ``sinks [H]`` are logits that take part in the softmax and carry no value. Result ``[..., T, H, DV]``.
    """
    length = q.shape[-3]
    if q.device.type == "meta":
        return q.new_empty((*q.shape[:-1], v.shape[-1]))
    flat = [item.reshape(length, *item.shape[-2:]) for item in (q, k, v)]
    places = torch.arange(length, device=q.device)
    out = _attend(flat[0], flat[1], flat[2], visible(places, places, kind, window), scale, softcap, sinks)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def visible(queries: Tensor, keys: Tensor, kind: str, window: int) -> Tensor:
    """Which key positions each query position sees: ``bool [queries, keys]``."""
    q, k = queries.unsqueeze(-1), keys.unsqueeze(-2)
    seen = k <= q
    if kind == "sliding":
        return seen & (k > q - window)
    if kind == "chunked":
        return seen & (k // window == q // window)
    return seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """``q [..., L, H, D]`` over ``k, v [..., N, KV, D]`` with ``seen [..., L, N]``; grouped-query heads share keys."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    q, k, v = (item.transpose(-3, -2) for item in (q, k, v))
    seen = seen.unsqueeze(-3)
    if not softcap and sinks is None:
        batched = [item if item.dim() == 4 else item.unsqueeze(0) for item in (q, k, v)]
        out = F.scaled_dot_product_attention(
            *batched, attn_mask=seen if seen.dim() == 4 else seen.unsqueeze(0), scale=scale, enable_gqa=heads != kv_heads
        )
        return (out if q.dim() == 4 else out.squeeze(0)).transpose(-3, -2)
    k, v = (item.repeat_interleave(heads // kv_heads, -3) for item in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        extra = sinks.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.softmax(torch.cat((scores, extra), -1), -1)[..., :-1]
    else:
        probabilities = torch.softmax(scores, -1)
    return (probabilities.to(v.dtype) @ v).transpose(-3, -2)


@register("nn.cache_write", pure=False)
def cache_write(cache: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """Write the rows of ``x [T, KV, D]`` to ``cache [C, KV, D]`` at ``slots [T]``, in place; the cache is the result."""
    if cache.device.type != "meta":
        cache.index_copy_(0, slots, x.to(cache.dtype))
    return cache


@register("nn.paged_attention")
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_size: int,
    scale: float,
    kind: str = "causal",
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of several sequences over a paged KV cache (Kwon et al. 2023).

    Args:
        q: ``[T, H, D]``, the tokens of all sequences one after another.
        k_cache, v_cache: ``[C, KV, D]`` and ``[C, KV, DV]``; position ``j`` of sequence ``s`` is in slot
            ``block_tables[s, j // block_size] * block_size + j % block_size``.
        block_tables: ``i32 [S, B]``; query_starts: ``i32 [S + 1]``, where each sequence's rows of ``q`` begin;
            context_lens: ``i32 [S]``, the keys of each sequence, those of this step included.
        scale, kind, window, softcap, sinks: as in ``nn.attention``.

    Returns:
        ``[T, H, DV]``.
    """
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    if q.device.type == "meta":
        return out
    lengths = context_lens.tolist()
    starts = query_starts.tolist()
    within = torch.arange(block_size, device=q.device)
    if q.shape[0] == len(lengths) and starts[-1] == len(lengths):  # decode: one row a sequence, one batched call
        longest = max(lengths)
        blocks = block_tables[:, : -(-longest // block_size)].long()
        slots = (blocks.unsqueeze(-1) * block_size + within).flatten(1)[:, :longest]
        places = torch.arange(longest, device=q.device)
        seen = visible((context_lens.long() - 1).unsqueeze(1), places.unsqueeze(0), kind, window)
        # Slots past a sequence's end may hold anything, NaN included: read a valid slot instead.
        slots = torch.where(places.unsqueeze(0) < context_lens.unsqueeze(1), slots, slots[:, :1])
        k, v = (item[slots].to(q.dtype) for item in (k_cache, v_cache))
        return _attend(q.unsqueeze(1), k, v, seen, scale, softcap, sinks).squeeze(1)
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        blocks = block_tables[index, : -(-length // block_size)].long()
        slots = (blocks.unsqueeze(-1) * block_size + within).flatten()[:length]
        places = torch.arange(length, device=q.device)
        seen = visible(places[length - (last - first) :], places, kind, window)
        k, v = (item[slots].to(q.dtype) for item in (k_cache, v_cache))
        out[first:last] = _attend(q[first:last], k, v, seen, scale, softcap, sinks)
    return out


@register("nn.grouped_linear")
def grouped_linear(
    x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """A linear layer whose weight each row chooses: mixture-of-experts projections.

    Args:
        x: ``[T, K]``, or ``[T, J, K]`` with a row of its own for each choice.
        ids: ``i64 [T, J]``, the experts that each token goes to.
        weight: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``; bias: ``[E, N]``.

    Returns:
        ``[T, J, N]``.
    """
    width = weight.shape[-1] if transposed else weight.shape[-2]
    out = x.new_empty((*ids.shape, width))
    if x.device.type == "meta":
        return out
    pairs = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, ids.shape[1], -1)
    for expert in torch.unique(ids).tolist():
        chosen = ids == expert
        matrix = weight[expert].t() if transposed else weight[expert]
        out[chosen] = F.linear(pairs[chosen], matrix, None if bias is None else bias[expert])
    return out
