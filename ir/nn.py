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
    turned, passed = x[..., :width].float(), x[..., width:]
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    # Each half is written in place: a rotated copy of x would cost two more passes over memory.
    out = torch.empty_like(turned)
    first, second = (
        (slice(width // 2), slice(width // 2, None)) if pairing == "half" else (slice(0, None, 2), slice(1, None, 2))
    )
    low, high = turned[..., first], turned[..., second]
    torch.mul(low, c[..., first], out=out[..., first]).addcmul_(high, s[..., first], value=-1)
    torch.mul(high, c[..., second], out=out[..., second]).addcmul_(low, s[..., second])
    out = out.to(x.dtype)
    return torch.cat((out, passed), -1) if passed.shape[-1] else out


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
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """``q [L, H, D]`` over ``k, v [N, KV, D]`` with ``seen [L, N]``; grouped-query heads share keys.

    ``seen=None`` is causal attention with ``L == N``, without softcap and sinks.
    """
    heads, kv_heads = q.shape[-2], k.shape[-2]
    q, k, v = (item.transpose(-3, -2) for item in (q, k, v))
    if seen is None or (not softcap and sinks is None):
        q, k, v = (item.unsqueeze(0) for item in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.squeeze(0).transpose(-3, -2)
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
    lengths, starts, tables = context_lens.tolist(), query_starts.tolist(), block_tables.tolist()
    heads, kv_heads = q.shape[-2], k_cache.shape[-2]
    plain = not softcap and sinks is None
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        # No query of this step sees a key before this one.
        begin = _first_seen(length - (last - first), kind, window)
        spans = _spans(tables[index], block_size, begin, length)
        k, v = (_rows(item, spans).to(q.dtype) for item in (k_cache, v_cache))
        if plain and last - first == 1:
            # Decode: the query heads of a group become the rows of one query, so its keys are read once.
            row = q[first].view(1, kv_heads, heads // kv_heads, -1)
            k, v = (item.transpose(0, 1).unsqueeze(0) for item in (k, v))
            out[first] = F.scaled_dot_product_attention(row, k, v, scale=scale).reshape(heads, -1)
            continue
        places = torch.arange(begin, length, device=q.device)
        seen = (
            None
            if plain and kind == "causal" and last - first == length
            else visible(places[length - begin - (last - first) :], places, kind, window)
        )
        out[first:last] = _attend(q[first:last], k, v, seen, scale, softcap, sinks)
    return out


def _first_seen(query: int, kind: str, window: int) -> int:
    """The first key position that a query at this position sees."""
    if kind == "sliding":
        return max(0, query - window + 1)
    return query // window * window if kind == "chunked" else 0


def _spans(table: list[int], block_size: int, begin: int, end: int) -> list[tuple[int, int]]:
    """The slots of the positions ``begin`` to ``end`` of a sequence, as few ranges as possible."""
    spans: list[tuple[int, int]] = []
    while begin < end:
        stop = min(end, (begin // block_size + 1) * block_size)
        slot = table[begin // block_size] * block_size + begin % block_size
        if spans and spans[-1][1] == slot:
            spans[-1] = (spans[-1][0], slot + stop - begin)
        else:
            spans.append((slot, slot + stop - begin))
        begin = stop
    return spans


def _rows(cache: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The slots of ``spans``; a view if they are one range."""
    parts = [cache[first:last] for first, last in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
