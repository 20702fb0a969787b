"""Emitted paged attention: interpreted against a dense reference, and compiled for sm_80 and sm_90."""

import random
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fuseline.codegen.offline import check_file, load_kernel_file
from fuseline.codegen.paged_attention import AttentionSpec, paged_attention_source

FP8 = torch.float8_e4m3fn
CAUSAL = AttentionSpec(9, 3, 24, 24, torch.float32, 16, 24**-0.5)


def paged_attention_reference(
    spec: AttentionSpec,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention in fp64, one sequence at a time; rows that no sequence owns are zero."""
    out = torch.zeros(q.shape[0], spec.num_heads, spec.v_head_dim, dtype=torch.float64, device=q.device)
    group = spec.num_heads // spec.num_kv_heads
    for s, length in enumerate(context_lens.tolist()):
        first, last = query_starts[s].item(), query_starts[s + 1].item()
        j = torch.arange(length, device=q.device)
        slots = block_tables[s, j // spec.block_size].long() * spec.block_size + j % spec.block_size
        k = k_cache[slots].double().repeat_interleave(group, 1)
        v = v_cache[slots].double().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", q[first:last].double(), k) * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        p = torch.arange(length - (last - first), length, device=q.device)[:, None]
        seen = j <= p
        if spec.kind == "sliding":
            seen &= j > p - (spec.window or 0)
        if spec.kind == "chunked":
            seen &= j // (spec.window or 1) == p // (spec.window or 1)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, last - first, 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


@dataclass(frozen=True)
class Case:
    """Sequences of (queries, context), padding rows that no sequence owns, and a forced number of splits."""

    spec: AttentionSpec
    sequences: tuple[tuple[int, int], ...]
    padding: int = 0
    num_splits: int | None = None
    magnitude: float = 1.0


def batch(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """Inputs of launch in its order. Cache slots that no key owns are NaN, block tables are shuffled and over-long."""
    spec, generator = case.spec, torch.Generator().manual_seed(0)
    lengths = [context for _, context in case.sequences] + [0] * case.padding
    starts = [0]
    for queries, _ in case.sequences:
        starts.append(starts[-1] + queries)
    starts += [starts[-1]] * case.padding
    tokens = starts[-1] + case.padding
    blocks = [-(-length // spec.block_size) for length in lengths]
    width = max(blocks) + 2
    pool = list(range(sum(blocks) + 3))
    random.Random(0).shuffle(pool)
    unowned = pool.pop()
    tables = torch.full((len(lengths), width), unowned, dtype=torch.int32)
    slots = (max(*pool, unowned) + 1) * spec.block_size
    k_cache = torch.full((slots, spec.num_kv_heads, spec.head_dim), torch.nan)
    v_cache = torch.full((slots, spec.num_kv_heads, spec.v_head_dim), torch.nan)
    for s, length in enumerate(lengths):
        for b in range(blocks[s]):
            tables[s, b] = pool.pop()
            used = min(spec.block_size, length - b * spec.block_size)
            row = int(tables[s, b]) * spec.block_size
            k_cache[row : row + used] = torch.randn(used, *k_cache.shape[1:], generator=generator)
            v_cache[row : row + used] = torch.randn(used, *v_cache.shape[1:], generator=generator)
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, generator=generator) * case.magnitude
    out = torch.full((tokens, spec.num_heads, spec.v_head_dim), torch.nan)
    integers = [tables, torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)]
    sinks = [torch.randn(spec.num_heads, generator=generator)] if spec.sinks else []
    q, out, *sinks = [t.to(spec.dtype) for t in (q, out, *sinks)]
    factors = []
    if spec.codes is None:
        k_cache, v_cache = k_cache.to(spec.dtype), v_cache.to(spec.dtype)
    else:
        (k_cache, k_factors), (v_cache, v_factors) = (in_codes(cache, spec.codes) for cache in (k_cache, v_cache))
        factors = [k_factors, v_factors]
    return [t.to(device) for t in (q, k_cache, v_cache, *integers, out, *sinks, *factors)]


def in_codes(cache: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and factors of some numbers; the factors of NaN are NaN."""
    largest = 127.0 if kind == torch.int8 else 448.0
    factors = (cache.abs().amax(-1, keepdim=True) / largest).bfloat16()
    codes = (cache / factors.float()).nan_to_num(0.0).clamp(-largest, largest)
    return (codes.round() if kind == torch.int8 else codes).to(kind), factors


def run_case(case: Case, folder: str, device: str = "cpu") -> tuple[float, float]:
    """RMSE of an emitted file relative to the reference, and that of rounding the reference to the dtype."""
    path = Path(folder, "attention.py")
    path.write_text(paged_attention_source(case.spec))
    inputs = batch(case, device)
    load_kernel_file(path).launch(*inputs, num_splits=case.num_splits)
    q, k_cache, v_cache, *integers = inputs[:6]
    more = inputs[7:]
    if case.spec.codes is not None:
        *more, k_factors, v_factors = more
        k_cache, v_cache = k_cache.double() * k_factors.double(), v_cache.double() * v_factors.double()
    expected = paged_attention_reference(case.spec, q, k_cache, v_cache, *integers, *more)
    scale = expected.square().mean()
    rounding = (expected.to(case.spec.dtype).double() - expected).square().mean() / scale
    return ((inputs[6].double() - expected).square().mean() / scale).sqrt().item(), rounding.sqrt().item()


def sliding(window: int, **changes: object) -> AttentionSpec:
    return replace(CAUSAL, kind="sliding", window=window, **changes)


def chunked(window: int, **changes: object) -> AttentionSpec:
    return replace(CAUSAL, kind="chunked", window=window, **changes)


DECODE = ((1, 1), (1, 77), (1, 16), (1, 130))
PREFILL = ((1, 1), (13, 13), (5, 40))
MIXED = ((1, 61), (0, 30), (17, 17), (1, 3), (0, 0), (7, 71))
MQA80 = AttentionSpec(5, 1, 80, 80, torch.float32, 8, 80**-0.5)
MHA64 = AttentionSpec(2, 2, 64, 64, torch.float32, 32, 0.3)
WIDE = AttentionSpec(2, 1, 256, 256, torch.float32, 16, 256**-0.5)
LATENT = AttentionSpec(2, 2, 40, 24, torch.float32, 16, 40**-0.5)
CASES = {
    "one token": Case(CAUSAL, ((1, 1),)),
    "one token, split": Case(CAUSAL, ((1, 129),), num_splits=3),
    "decode": Case(CAUSAL, DECODE, num_splits=1),
    "decode, split": Case(CAUSAL, DECODE, num_splits=3),
    "decode, splits without keys": Case(CAUSAL, DECODE, num_splits=19),
    "decode, chosen splits": Case(CAUSAL, DECODE),
    "decode, padded": Case(CAUSAL, DECODE, padding=3, num_splits=1),
    "decode, padded, split": Case(CAUSAL, DECODE, padding=3, num_splits=2),
    "as many queries as sequences": Case(CAUSAL, ((2, 50), (0, 9), (1, 40), (0, 0), (2, 2)), num_splits=1),
    "as many queries as sequences, split": Case(CAUSAL, ((2, 50), (0, 9), (1, 40), (0, 0), (2, 2)), num_splits=2),
    "prefill": Case(CAUSAL, PREFILL),
    "a prime number of tokens": Case(CAUSAL, ((53, 53),)),
    "mixed": Case(CAUSAL, MIXED),
    "large logits": Case(CAUSAL, MIXED, magnitude=30.0),
    "mqa, head dim 80, blocks of 8": Case(MQA80, MIXED),
    "mqa, head dim 80, blocks of 8, decode": Case(MQA80, DECODE, num_splits=2),
    "mha, blocks of 32": Case(MHA64, MIXED),
    "mha, blocks of 32, decode": Case(MHA64, DECODE, num_splits=2),
    "head dim 256": Case(WIDE, PREFILL),
    "head dim 256, decode": Case(WIDE, DECODE, num_splits=2),
    "head dim 512": Case(replace(WIDE, head_dim=512, v_head_dim=512), PREFILL),
    "head dim 512, decode": Case(replace(WIDE, head_dim=512, v_head_dim=512), DECODE, num_splits=2),
    "head dim 320, int8, decode": Case(
        replace(WIDE, head_dim=320, v_head_dim=264, dtype=torch.float16, codes=torch.int8), DECODE, num_splits=2
    ),
    "other value head dim": Case(LATENT, PREFILL),
    "other value head dim, decode": Case(LATENT, DECODE, num_splits=2),
    "37 heads on one": Case(replace(MQA80, num_heads=37), ((3, 5), (1, 20))),
    "37 heads on one, decode": Case(replace(MQA80, num_heads=37), DECODE[:2], num_splits=2),
    "window 1": Case(sliding(1), MIXED),
    "window 1, decode": Case(sliding(1), DECODE, num_splits=2),
    "window 7": Case(sliding(7), MIXED),
    "window 50, decode": Case(sliding(50), DECODE, padding=1, num_splits=3),
    "window beyond the context": Case(sliding(1000), MIXED),
    "chunks of 7": Case(chunked(7), MIXED),
    "chunks of 50, decode": Case(chunked(50), DECODE, padding=1, num_splits=3),
    "softcap": Case(replace(CAUSAL, softcap=20.0), MIXED, magnitude=4.0),
    "softcap, decode": Case(replace(CAUSAL, softcap=2.0), DECODE, num_splits=2, magnitude=4.0),
    "sinks": Case(replace(CAUSAL, sinks=True), MIXED),
    "sinks, decode": Case(replace(CAUSAL, sinks=True), DECODE, padding=2, num_splits=1),
    "sinks, decode, split": Case(sliding(90, sinks=True), DECODE, padding=2, num_splits=3),
    "fp16": Case(replace(CAUSAL, dtype=torch.float16), MIXED),
    "fp16, decode": Case(replace(CAUSAL, dtype=torch.float16, sinks=True), DECODE, num_splits=2),
    "int8": Case(replace(CAUSAL, codes=torch.int8), MIXED),
    "int8, decode": Case(replace(CAUSAL, codes=torch.int8), DECODE, padding=2, num_splits=1),
    "int8, decode, split": Case(sliding(50, codes=torch.int8, sinks=True), DECODE, padding=1, num_splits=3),
    "int8, fp16, other value head dim": Case(replace(LATENT, codes=torch.int8, dtype=torch.float16), MIXED),
    "int8, fp16, mqa, decode": Case(replace(MQA80, codes=torch.int8, dtype=torch.float16), DECODE, num_splits=2),
    "fp8": Case(replace(CAUSAL, codes=FP8, softcap=20.0), MIXED, magnitude=4.0),
    "fp8, decode, split": Case(replace(MHA64, codes=FP8), DECODE, num_splits=2),
    "fp8, fp16, head dim 16, decode": Case(
        replace(CAUSAL, head_dim=16, v_head_dim=16, codes=FP8, dtype=torch.float16), DECODE
    ),
    "fp8, fp16": Case(chunked(7, codes=FP8, dtype=torch.float16), MIXED),
}
SMALL_CHANGES = {"one key less": "key < end - 1", "a block too far": "key < end + 16"}
GPU_SPECS = [
    AttentionSpec(32, 8, 128, 128, torch.bfloat16, 16, 128**-0.5),
    AttentionSpec(12, 12, 64, 64, torch.float16, 32, 64**-0.5),
    AttentionSpec(8, 4, 256, 256, torch.bfloat16, 16, 0.0625, "sliding", 100, softcap=50.0),
    AttentionSpec(16, 2, 64, 64, torch.bfloat16, 16, 0.125, "sliding", 128, sinks=True),
    AttentionSpec(71, 1, 64, 64, torch.bfloat16, 16, 0.125),
    AttentionSpec(16, 16, 192, 128, torch.bfloat16, 16, 192**-0.5),
    AttentionSpec(8, 8, 80, 80, torch.float16, 16, 80**-0.5, "chunked", 64),
    AttentionSpec(9, 3, 72, 72, torch.float16, 8, 72**-0.5),
    AttentionSpec(9, 3, 64, 64, torch.float32, 16, 0.125),
    AttentionSpec(4, 1, 256, 256, torch.float32, 16, 0.0625, "sliding", 100, softcap=50.0, sinks=True),
    AttentionSpec(32, 8, 128, 128, torch.bfloat16, 16, 128**-0.5, codes=torch.int8),
    AttentionSpec(8, 4, 256, 256, torch.bfloat16, 16, 0.0625, "sliding", 100, softcap=50.0, codes=torch.int8),
    AttentionSpec(16, 2, 64, 64, torch.float16, 32, 0.125, "sliding", 128, sinks=True, codes=FP8),
    AttentionSpec(8, 1, 512, 512, torch.bfloat16, 16, 512**-0.5),
    AttentionSpec(8, 4, 320, 320, torch.float16, 16, 320**-0.5, codes=torch.int8),
]


def _name(spec: AttentionSpec) -> str:
    codes = f"-{str(spec.codes)[6:]}" if spec.codes else ""
    return f"{spec.num_heads}x{spec.num_kv_heads}x{spec.head_dim}-{spec.kind}-{str(spec.dtype)[6:]}{codes}"


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    case = CASES[name]
    error, _ = pool.submit(run_case, case, str(tmp_path)).result()
    assert error <= (1e-5 if case.spec.dtype == torch.float32 else 1e-3)


def run_broken(case: Case, change: str, folder: str) -> float:
    """The error of a kernel file in which the bound of the keys is changed."""
    path = Path(folder, "broken.py")
    text = paged_attention_source(case.spec)
    assert text.count("live = (key < end) |") == 1
    path.write_text(text.replace("live = (key < end) |", f"live = ({change}) |"))
    inputs = batch(case)
    load_kernel_file(path).launch(*inputs, num_splits=case.num_splits)
    expected = paged_attention_reference(case.spec, *inputs[:6], *inputs[7:])
    return ((inputs[6].double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("change", SMALL_CHANGES)
def test_a_small_bug_is_seen(change: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """If this fails, the cases above prove nothing: poison or inputs are too kind."""
    error = pool.submit(run_broken, Case(CAUSAL, DECODE, num_splits=2), SMALL_CHANGES[change], str(tmp_path)).result()
    assert not error <= 1e-3


def test_source_is_deterministic_and_states_its_numbers() -> None:
    source = paged_attention_source(sliding(7, softcap=30.0))
    assert source == paged_attention_source(sliding(7, softcap=30.0)) != paged_attention_source(CAUSAL)
    assert "position - 7 + 1" in source and not re.search(r"\$[A-Z]", source)
    assert "sinks" not in source


@pytest.mark.parametrize("spec", GPU_SPECS, ids=_name)
def test_compiles_without_spills(spec: AttentionSpec, tmp_path: Path) -> None:
    path = tmp_path / "attention.py"
    path.write_text(paged_attention_source(spec))
    for resources in check_file(path, (90,) if spec.codes == FP8 else (80, 90)):
        if resources.kernel != "combine":
            assert "cp.async.cg.shared.global" in resources.ptx, "keys and values are not loaded 16 bytes at a time"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float64},
        {"num_kv_heads": 2},
        {"head_dim": 520},
        {"kind": "sliding"},
        {"window": 5},
        {"head_dim": 23, "codes": torch.int8},
    ],
)
def test_refuses_what_it_cannot_do(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(CAUSAL, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", GPU_SPECS, ids=_name)
def test_on_the_gpu(spec: AttentionSpec, tmp_path: Path) -> None:
    for sequences in (DECODE, ((1, 3001), (1, 999)), MIXED, ((700, 1203), (1, 800))):
        error, rounding = run_case(Case(spec, sequences), str(tmp_path), "cuda")
        assert error <= (1e-5 if spec.dtype == torch.float32 else 2 * rounding + 1e-3)
