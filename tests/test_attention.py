"""Attention over the paged cache is attention of each sequence over its own tokens, whatever else lies in the cache.

If this fails, the CPU path, and the yardstick of the GPU's kernels, mixes sequences or reads what was never written.
"""

from __future__ import annotations

import pytest
import torch

from fuseline.ir.attention import attention, cache_write, paged_attention

BLOCK = 8
# (tokens already in the cache, tokens of this step): decodes of very different lengths, prefills, and chunks of them.
STEPS = {
    "decode": [(0, 1), (7, 1), (8, 1), (95, 1), (40, 1), (41, 1)],
    "one": [(13, 1)],
    "prefill": [(0, 9), (0, 1), (0, 24)],
    "mixed": [(33, 1), (16, 1), (5, 7), (0, 17), (64, 1)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("kind", "window", "softcap", "sinks"),
    [("causal", 0, 0.0, False), ("sliding", 11, 0.0, False), ("chunked", 16, 0.0, False), ("sliding", 9, 3.0, True)],
)
def test_paged_attention_is_attention_of_each_sequence(
    step: str, kind: str, window: int, softcap: float, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, width = 6, 2, 16
    lengths = [past + new for past, new in STEPS[step]]
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    caches = [torch.full(((sum(counts) + 3) * BLOCK, kv_heads, width), float("nan")) for _ in "kv"]
    extra = torch.randn(heads, generator=generator) if sinks else None
    queries, expected = [], []
    for row, ((_, new), length, count) in enumerate(zip(STEPS[step], lengths, counts, strict=True)):
        q, k, v = (torch.randn(length, n, width, generator=generator) for n in (heads, kv_heads, kv_heads))
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        places = torch.arange(length)
        slots = tables[row, places // BLOCK].long() * BLOCK + places % BLOCK
        for cache, rows in zip(caches, (k, v), strict=True):
            assert cache_write(cache, rows, slots) is cache
        queries.append(q[-new:])
        expected.append(attention(q, k, v, 0, 0.3, kind, window, softcap, extra)[-new:])
    starts = torch.tensor([0, *[new for _, new in STEPS[step]]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    found = paged_attention(
        torch.cat(queries), *caches, tables, starts, sizes, BLOCK, 0.3, kind, window, softcap, extra
    )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)
