"""Emitted grouped linear layers: interpreted against a loop over pairs, and compiled for sm_80 and sm_90."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fuseline.codegen.grouped_linear import GroupedLinearSpec, grouped_linear_source
from fuseline.codegen.offline import check_file, load_kernel_file
from fuseline.ir.quantized import dequantize, quantize
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType

SPEC = GroupedLinearSpec(8, 2, 40, 24, torch.float32)
UNLUCKY = GroupedLinearSpec(5, 3, 67, 71, torch.float32)
CASES = {
    "one token": (SPEC, 1),
    "a few tokens": (SPEC, 13),
    "a prime number of tokens": (SPEC, 101),
    "many tokens of many experts": (replace(SPEC, num_experts=130, top_k=4), 140),
    "many tokens": (replace(SPEC, in_features=16, out_features=16, num_experts=3), 331),
    "unlucky features": (UNLUCKY, 7),
    "unlucky features, more tokens": (UNLUCKY, 29),
    "a row per pair": (replace(UNLUCKY, per_pair=True), 17),
    "transposed": (replace(UNLUCKY, transposed=True), 17),
    "bias": (replace(UNLUCKY, bias=True), 17),
    "all three": (replace(UNLUCKY, per_pair=True, transposed=True, bias=True), 31),
    "one expert": (replace(UNLUCKY, num_experts=1, top_k=1), 19),
    "more experts than pairs": (replace(SPEC, num_experts=130, top_k=4), 5),
    "a few of many experts": (replace(UNLUCKY, chosen_from=40, bias=True), 90),
    "int8": (replace(UNLUCKY, scheme=scheme_of("int8"), bias=True), 17),
    "int8, one expert": (replace(UNLUCKY, scheme=scheme_of("int8"), num_experts=1, top_k=1), 19),
    "int4g32, a row per pair": (replace(UNLUCKY, scheme=scheme_of("int4g32"), in_features=96, per_pair=True), 29),
    "int4g64": (replace(UNLUCKY, scheme=scheme_of("int4g64"), in_features=192, num_experts=3), 131),
    "uint4g32": (replace(UNLUCKY, scheme=scheme_of("uint4g32"), in_features=160, bias=True), 7),
    "uint4g128, fp16": (replace(UNLUCKY, scheme=scheme_of("uint4g128"), in_features=256, dtype=torch.float16), 1),
    "int8d": (replace(UNLUCKY, scheme=scheme_of("int8d"), bias=True), 31),
    "int8d, a row per pair": (replace(UNLUCKY, scheme=scheme_of("int8d"), in_features=160, per_pair=True), 1),
    "fp8": (replace(UNLUCKY, scheme=scheme_of("fp8")), 150),
    "fp8, a row per pair": (replace(UNLUCKY, scheme=scheme_of("fp8"), num_experts=2, per_pair=True, bias=True), 31),
    "fp8, fp16": (replace(UNLUCKY, scheme=scheme_of("fp8"), in_features=96, dtype=torch.float16), 7),
    "fp16": (replace(UNLUCKY, dtype=torch.float16, bias=True), 37),
}
# The experts that ranks before and after this one have.
SHARES = {
    "the first rank's": ("unlucky features, more tokens", (0, 5)),
    "the last rank's": ("all three", (10, 0)),
    "one of many": ("one expert", (7, 8)),
    "few of many": ("a few tokens", (20, 30)),
    "a few of many, with pairs that are sorted": ("a few of many experts", (17, 18)),
    "in codes": ("int4g64", (3, 3)),
    "rows in codes": ("int8d", (4, 2)),
    "in fp16": ("fp16", (5, 5)),
}


def grouped_linear_reference(spec: GroupedLinearSpec, x, ids, weight, bias=None):  # type: ignore[no-untyped-def]
    """One matrix-vector product per pair, in fp64."""
    out = torch.zeros(*ids.shape, spec.out_features, dtype=torch.float64, device=x.device)
    for t, j in ((t, j) for t in range(ids.shape[0]) for j in range(spec.top_k)):
        if not 0 <= ids[t, j] < spec.num_experts:
            continue
        matrix = weight[ids[t, j]].double()
        row = (x[t, j] if spec.per_pair else x[t]).double()
        out[t, j] = row @ matrix if spec.transposed else matrix @ row
        if bias is not None:
            out[t, j] += bias[ids[t, j]].double()
    return out


def inputs(
    spec: GroupedLinearSpec, tokens: int, device: str = "cpu", others: tuple[int, int] = (0, 0)
) -> list[torch.Tensor]:
    """x, ids (distinct within a token, the last expert without pairs where that is possible), weight and bias."""
    generator = torch.Generator().manual_seed(tokens)
    usable = max(sum(others) + spec.num_experts - 1, spec.top_k)
    ids = torch.stack([torch.randperm(usable, generator=generator)[: spec.top_k] for _ in range(tokens)]) - others[0]
    features = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
    x_shape = (tokens, spec.top_k, spec.in_features) if spec.per_pair else (tokens, spec.in_features)
    x = torch.randn(x_shape, generator=generator)
    weight = torch.randn(spec.num_experts, *features, generator=generator)
    bias = [torch.randn(spec.num_experts, spec.out_features, generator=generator)] if spec.bias else []
    held = weight.to(spec.dtype) if spec.scheme is None else quantize(weight, spec.scheme)
    rows = x.to(spec.dtype) if spec.codes is None else quantize(x, spec.codes)
    return [rows.to(device), ids.to(device), held.to(device), *(item.to(device, spec.dtype) for item in bias)]


def run_case(
    spec: GroupedLinearSpec, tokens: int, folder: str, device: str = "cpu", others: tuple[int, int] = (0, 0)
) -> tuple[float, float]:
    """RMSE of an emitted file relative to the reference, and that of rounding the reference to the dtype."""
    path = Path(folder, "grouped.py")
    path.write_text(grouped_linear_source(spec))
    x, ids, weight, *bias = inputs(spec, tokens, device, others)
    out = torch.full((tokens, spec.top_k, spec.out_features), torch.nan, dtype=spec.dtype, device=device)
    load_kernel_file(path).launch(x, ids, weight, out, *bias)
    if spec.scheme is not None:
        kind = TensorType(spec.scheme.name, (spec.num_experts, spec.out_features, spec.in_features))
        weight = dequantize(weight, kind, torch.float32)
    if spec.codes is not None:
        x = dequantize(x, TensorType(spec.codes.name, (*x.shape[:-1], spec.in_features)), torch.float32)
    expected = grouped_linear_reference(spec, x, ids, weight, *bias)
    if sum(others):
        away = (ids < 0) | (ids >= spec.num_experts)
        assert away.any() and not away.all() and not out[away].any(), "rows of no expert here are zeros"
    scale = expected.square().mean()
    rounding = (expected.to(spec.dtype).double() - expected).square().mean() / scale
    return ((out.double() - expected).square().mean() / scale).sqrt().item(), rounding.sqrt().item()


def run_sort(
    spec: GroupedLinearSpec, tokens: int, folder: str, others: tuple[int, int]
) -> tuple[list[int], list[int], list[int]]:
    path = Path(folder, "sort.py")
    path.write_text(grouped_linear_source(spec))
    ids = inputs(spec, tokens, others=others)[1]
    order, starts = load_kernel_file(path).sort_pairs(ids)
    return ids.flatten().tolist(), order.tolist(), starts.tolist()


def variant_names(spec: GroupedLinearSpec, tokens: list[int], folder: str) -> list[int]:
    path = Path(folder, "grouped.py")
    path.write_text(grouped_linear_source(spec))
    module = load_kernel_file(path)
    return [module.VARIANTS.index(module.choose_tile(torch.device("cpu"), count)) for count in tokens]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    spec, tokens = CASES[name]
    error, _ = pool.submit(run_case, spec, tokens, str(tmp_path)).result()
    assert error <= (1e-5 if spec.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", SHARES)
def test_pairs_of_other_ranks_are_zeros(name: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Experts that are not here have numbers below 0 or past the last one's."""
    case, others = SHARES[name]
    spec, tokens = CASES[case]
    error, _ = pool.submit(run_case, spec, tokens, str(tmp_path), "cpu", others).result()
    assert error <= (1e-5 if spec.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("tokens", "others"), [(1, (0, 0)), (11, (3, 4)), (700, (0, 0)), (2500, (6, 6))])
def test_pairs_are_sorted_stably(
    tokens: int, others: tuple[int, int], pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """2500 tokens take the larger of the two sorting tiles."""
    spec = replace(SPEC, num_experts=6)
    ids, order, starts = pool.submit(run_sort, spec, tokens, str(tmp_path), others).result()
    ids = [expert if 0 <= expert < spec.num_experts else spec.num_experts for expert in ids]
    assert order == sorted(range(len(ids)), key=lambda pair: ids[pair])
    assert starts == [sum(i < expert for i in ids) for expert in range(spec.num_experts + 2)]


def test_cases_reach_every_tile(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """If this fails, a tile is emitted that no case above runs."""
    reached = {pool.submit(variant_names, spec, [tokens], str(tmp_path)).result()[0] for spec, tokens in CASES.values()}
    assert reached == set(range(2, 7))


def test_tiles_are_those_for_the_rows_that_reach_a_rank(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A rank's 8 of 64 experts have as many rows each as all 64 would have."""
    few, counts = replace(SPEC, num_experts=8, top_k=2), [100, 1000, 4000]
    tiles = [
        pool.submit(variant_names, spec, counts, str(tmp_path)).result()
        for spec in (few, replace(few, chosen_from=64), replace(few, num_experts=64))
    ]
    assert tiles[1] == tiles[2] == [4, 5, 6] and tiles[0] != tiles[1]


def test_source_is_deterministic_and_states_its_numbers() -> None:
    source = grouped_linear_source(UNLUCKY)
    assert source == grouped_linear_source(UNLUCKY) != grouped_linear_source(SPEC)
    assert '"IN": 67, "OUT": 71' in source and "$" not in source and "bias" not in source


GPU_SPECS = [
    GroupedLinearSpec(8, 2, 4096, 28672, torch.bfloat16),
    GroupedLinearSpec(128, 8, 768, 2048, torch.bfloat16, per_pair=True),
    GroupedLinearSpec(32, 4, 2880, 5760, torch.bfloat16, transposed=True, bias=True),
    GroupedLinearSpec(6, 2, 1000, 1407, torch.float16, bias=True),
    GroupedLinearSpec(6, 2, 1001, 1407, torch.bfloat16, transposed=True),
    GroupedLinearSpec(8, 2, 4096, 28672, torch.bfloat16, scheme=scheme_of("int8")),
    GroupedLinearSpec(128, 8, 768, 2048, torch.bfloat16, per_pair=True, scheme=scheme_of("int4g128")),
    GroupedLinearSpec(32, 4, 2880, 5760, torch.bfloat16, bias=True, scheme=scheme_of("uint4g32")),
    GroupedLinearSpec(8, 2, 1024, 1408, torch.float32, scheme=scheme_of("uint4g64")),
    GroupedLinearSpec(8, 2, 4096, 28672, torch.bfloat16, scheme=scheme_of("fp8")),
    GroupedLinearSpec(128, 8, 768, 2048, torch.bfloat16, per_pair=True, scheme=scheme_of("int8d")),
    GroupedLinearSpec(32, 4, 2880, 5760, torch.bfloat16, bias=True, scheme=scheme_of("int8d")),
    GroupedLinearSpec(6, 2, 1000, 1407, torch.float16, bias=True, scheme=scheme_of("fp8")),
    GroupedLinearSpec(8, 2, 1024, 1408, torch.float32, scheme=scheme_of("fp8")),
    GroupedLinearSpec(8, 2, 1001, 1407, torch.float32, per_pair=True, scheme=scheme_of("int8d")),
    GroupedLinearSpec(8, 2, 1024, 3584, torch.float32),
    GroupedLinearSpec(8, 2, 1001, 1407, torch.float32, per_pair=True, transposed=True, bias=True),
]


def _name(spec: GroupedLinearSpec) -> str:
    layout = "transposed-" if spec.transposed else ""
    held = f"-{spec.scheme.name}" if spec.scheme else ""
    return f"{spec.num_experts}x{spec.in_features}x{spec.out_features}-{layout}{str(spec.dtype)[6:]}{held}"


@pytest.mark.parametrize("spec", GPU_SPECS, ids=_name)
def test_compiles_without_spills(spec: GroupedLinearSpec, tmp_path: Path) -> None:
    path = tmp_path / "grouped.py"
    path.write_text(grouped_linear_source(spec))
    vectors = spec.in_features % 8 == 0 and (spec.out_features % 8 == 0 or not spec.transposed)
    for resources in check_file(path):
        if vectors and spec.scheme is None and resources.kernel == "grouped_linear":
            assert "cp.async.cg.shared.global" in resources.ptx, "operands are not loaded 16 bytes at a time"


def test_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float64"):
        replace(SPEC, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", GPU_SPECS, ids=_name)
def test_on_the_gpu(spec: GroupedLinearSpec, tmp_path: Path) -> None:
    for tokens in (1, 17, 211):
        error, rounding = run_case(spec, tokens, str(tmp_path), "cuda")
        # The tensor cores sum products of E4M3 with fewer bits than fp16's rounding hides.
        sums = 1e-3 if spec.codes is not None and spec.codes.floats else 0.0
        assert error <= (1e-5 if spec.dtype == torch.float32 else max(2 * rounding, sums))
