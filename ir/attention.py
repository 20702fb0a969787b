"""Attention: of one sequence over itself, and of many sequences over a paged KV cache, with references in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_rounding import numbers
from .ops import register


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
        cache[slots] = x.to(cache.dtype)
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
    k_factors: Tensor | None = None,
    v_factors: Tensor | None = None,
) -> Tensor:
    """Attention of several sequences over a paged KV cache (Kwon et al. 2023).

    Args:
        q: ``[T, H, D]``, the tokens of all sequences one after another.
        k_cache, v_cache: ``[C, KV, D]`` and ``[C, KV, DV]``; position ``j`` of sequence ``s`` is in slot
            ``block_tables[s, j // block_size] * block_size + j % block_size``.
        block_tables: ``i32 [S, B]``; query_starts: ``i32 [S + 1]``, where each sequence's rows of ``q`` begin;
            context_lens: ``i32 [S]``, the keys of each sequence, those of this step included.
        scale, kind, window, softcap, sinks: as in ``nn.attention``.
        k_factors, v_factors: ``[C, KV, 1]``, what the numbers of a cache that holds codes are to be multiplied by.

    Returns:
        ``[T, H, DV]``.
    """
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    if q.device.type == "meta":
        return out
    lengths, starts, tables = context_lens.tolist(), query_starts.tolist(), block_tables.tolist()
    caches = _Blocks(k_cache, k_factors, block_size, q.dtype), _Blocks(v_cache, v_factors, block_size, q.dtype)
    plain = not softcap and sinks is None
    decoding: list[tuple[int, int]] = []  # (blocks to read, sequence)
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        # No query of this step sees a key before this one.
        begin = _first_seen(length - (last - first), kind, window)
        if plain and last - first == 1:
            decoding.append(((length - 1) // block_size - begin // block_size + 1, index))
            continue
        k, v = (cache.rows(tables[index], begin, length) for cache in caches)
        seen = None
        if not (plain and kind == "causal" and last - first == length):
            places = torch.arange(begin, length, device=q.device)
            seen = visible(places[length - begin - (last - first) :], places, kind, window)
        out[first:last] = _attend(q[first:last], k, v, seen, scale, softcap, sinks)
    for group in _groups(decoding):
        begins = [_first_seen(lengths[index] - 1, kind, window) for index in group]
        rows = [starts[index] for index in group]
        ends = [lengths[index] for index in group]
        if len(group) == len(q) == len(lengths):  # every row of the step, in order
            return _decode(q, *caches, block_tables, begins, ends, scale)
        out[rows] = _decode(q[rows], *caches, block_tables[group], begins, ends, scale)
    return out


def _groups(sized: list[tuple[int, int]]) -> list[list[int]]:
    """Sequences that share one call of padded attention, given with their sizes: padding at most doubles what is read."""
    groups: list[list[int]] = []
    widest = total = 0
    for size, index in sorted(sized, reverse=True):
        if groups and widest * (len(groups[-1]) + 1) <= 2 * (total + size):
            groups[-1].append(index)
            total += size
        else:
            groups.append([index])
            widest = total = size
    return [sorted(group) for group in groups]


def _decode(
    q: Tensor, k_cache: _Blocks, v_cache: _Blocks, tables: Tensor, begins: list[int], ends: list[int], scale: float
) -> Tensor:
    """One query of each of ``G`` sequences, ``q [G, H, D]``, over the keys from ``begins`` to ``ends`` of each."""
    count, heads, _ = q.shape
    kv_heads = k_cache.heads
    # The query heads of a group become the rows of one query, so its keys are read once.
    query = q.view(count, kv_heads, heads // kv_heads, -1)
    if count == 1:
        k, v = (cache.rows(tables[0].tolist(), begins[0], ends[0]) for cache in (k_cache, v_cache))
        k, v = (item.transpose(0, 1).unsqueeze(0) for item in (k, v))
        return F.scaled_dot_product_attention(query, k, v, scale=scale).reshape(count, heads, -1)
    size = k_cache.size
    firsts = [begin // size for begin in begins]
    width = max((end - 1) // size - first + 1 for first, end in zip(firsts, ends))
    if any(firsts):
        columns = torch.tensor(firsts, device=q.device)[:, None] + torch.arange(width, device=q.device)
        tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
    k, v = (cache.gather(tables[:, :width]) for cache in (k_cache, v_cache))
    bounds = [(begin - first * size, end - first * size) for first, begin, end in zip(firsts, begins, ends)]
    low, high = torch.tensor(bounds, device=q.device).unsqueeze(-1).unbind(1)
    places = torch.arange(width * size, device=q.device)
    seen = (places >= low) & (places < high)
    # Whatever lies past the end must not meet a weight of zero as a NaN.
    torch._foreach_zero_([item[row, end:] for row, (_, end) in enumerate(bounds) for item in (k, v)])
    k, v = (item.transpose(1, 2) for item in (k, v))
    out = F.scaled_dot_product_attention(query, k, v, attn_mask=seen[:, None, None], scale=scale)
    return out.reshape(count, heads, -1)


def _first_seen(query: int, kind: str, window: int) -> int:
    """The first key position that a query at this position sees."""
    if kind == "sliding":
        return max(0, query - window + 1)
    return query // window * window if kind == "chunked" else 0


class _Blocks:
    """A cache ``[C, KV, D]`` seen as blocks of ``size`` slots, whose numbers are read in ``dtype``."""

    def __init__(self, cache: Tensor, factors: Tensor | None, size: int, dtype: torch.dtype) -> None:
        self.size = size
        self.heads = cache.shape[1]
        self._dtype = dtype
        self._stores = cache, factors

    def rows(self, table: list[int], begin: int, end: int) -> Tensor:
        """The positions ``begin`` to ``end`` of the sequence with this block table, ``[end - begin, KV, D]``."""
        first = begin // self.size
        blocks = table[first : (end - 1) // self.size + 1]
        start = begin - first * self.size
        if all(block == blocks[0] + place for place, block in enumerate(blocks)):
            start += blocks[0] * self.size
            return self._numbers(lambda store: store[start : start + end - begin])

        def gathered(store: Tensor) -> Tensor:
            wanted = torch.tensor(blocks, device=store.device)
            return self._whole(store).index_select(0, wanted).flatten(0, 1)[start : start + end - begin]

        return self._numbers(gathered)

    def gather(self, tables: Tensor) -> Tensor:
        """The blocks of several sequences: ``[G, width * size, KV, D]`` for ``tables [G, width]``; a copy."""

        def gathered(store: Tensor) -> Tensor:
            found = self._whole(store).index_select(0, tables.flatten())
            return found.view(tables.shape[0], -1, *store.shape[1:])

        return self._numbers(gathered)

    def _whole(self, store: Tensor) -> Tensor:
        """The whole blocks: ``[blocks, size, KV, D]``."""
        return store[: store.shape[0] // self.size * self.size].view(-1, self.size, *store.shape[1:])

    def _numbers(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        cache, factors = self._stores
        return numbers(part(cache), None if factors is None else part(factors), self._dtype)
