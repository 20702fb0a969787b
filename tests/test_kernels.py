"""Every emitted kernel: right in the interpreter on unlucky shapes, and within the registers of sm_80 and sm_90."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from families import REQUIRED, make
from traced import traced

from fuseline import passes
from fuseline.codegen.check import errors, random_case
from fuseline.codegen.kernels import Kernel, emit_kernels
from fuseline.codegen.offline import check_file, compile_variant, load_kernel_file
from fuseline.ir.graph import Graph
from fuseline.ir.ops import op_name
from fuseline.ir.parse import parse
from fuseline.ir.skeleton import skeleton
from fuseline.ir.tiles import TILE_POINTWISE

# Tokens and sequences: one token, decode of a few, a prime number of tokens in a ragged step.
CASES = ((1, 1), (3, 3), (19, 4))


@cache
def lowered(name: str, dtype: torch.dtype = torch.float32) -> Graph:
    return passes.run(traced(skeleton(make(name), dtype)))


def interpreted(path: str, text: str) -> list[float]:
    """The worst error of each case; runs where Triton interprets."""
    graph = parse(text)
    launch = load_kernel_file(path).launch
    order = Kernel(graph.name, "", graph).order
    return [max(errors(graph, launch, order, random_case(graph, *case, seed=7, device="cpu"))) for case in CASES]


def write(kernel: Kernel, folder: Path) -> Path:
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    return path


@pytest.mark.parametrize("name", REQUIRED)
def test_kernels_are_right_in_the_interpreter(name: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    kernels = emit_kernels(lowered(name))
    jobs = {k.name: pool.submit(interpreted, str(write(k, tmp_path)), str(k.graph)) for k in kernels}
    found = {kernel: max(job.result()) for kernel, job in jobs.items()}
    assert {kernel: error for kernel, error in found.items() if not error <= 1e-5} == {}


def tilings(path: str, text: str) -> dict[str, float]:
    """The worst error of each kind of tiling of a matmul, whatever the number of rows; runs where Triton interprets."""
    graph, module = parse(text), load_kernel_file(path)
    order = Kernel(graph.name, "", graph).order
    kinds = {"row": 0, "library": len(module.CONFIGS) - 1}
    own = {
        "few": module.few(16, 16, 32, 4, 1, 1),
        "fewest": module.few(8, 16, 32, 4, 1, 1),
        "parts": module.few(16, 32, 16, 4, 1, 2),
        "tile": module.tile(32, 32, 32, 4, 1),
    }
    for label, config in own.items():
        kinds[label] = len(module.CONFIGS)
        module.CONFIGS.append(config)
    found = {}
    for label, index in kinds.items():
        launch = partial(module.launch, choices=((None, index),))
        case = random_case(graph, 3, 3, seed=7, device="cpu")
        found[label] = max(errors(graph, launch, order, case))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_every_kind_of_tiling_is_right(name: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    for kernel in emit_kernels(lowered(name)):
        if "CONFIGS" in kernel.source:
            found = pool.submit(tilings, str(write(kernel, tmp_path)), str(kernel.graph)).result()
            assert {label: error for label, error in found.items() if not error <= 1e-5} == {}


def test_the_assembler_does_not_know_how_short_a_loop_is(tmp_path: Path) -> None:
    """It would unroll it as a whole and then, where lanes are parted, take the sums to be the zeros that they began as."""
    gate_up = next(kernel for kernel in emit_kernels(lowered("llama", torch.bfloat16)) if kernel.name == "gate_up")
    module = load_kernel_file(write(gate_up, tmp_path))
    assert "%nctaid.z" in compile_variant(module.few(16, 32, 32, 4, 3, 1), 90).ptx


# bf16 for every family; fp32, whose tiles differ, and sm_80 for one of each kind of kernel.
WIDE = ("llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.bfloat16) for name in REQUIRED] + [(name, torch.float32) for name in WIDE]
)
def test_kernels_compile_without_spills(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    targets = (80, 90) if name in WIDE else (90,)
    for kernel in emit_kernels(lowered(name, dtype)):
        for resources in check_file(write(kernel, tmp_path), targets):
            assert resources.spill_bytes == 0


@pytest.mark.parametrize("name", REQUIRED)
def test_emission_is_deterministic_and_shared_between_layers(name: str) -> None:
    first, second = emit_kernels(lowered(name)), emit_kernels(parse(str(lowered(name))))
    assert [kernel.source for kernel in first] == [kernel.source for kernel in second]
    counts = {kernel.name: len(kernel.regions) for kernel in first}
    assert max(counts.values()) >= 2, "layers that do the same share a kernel"


def test_a_llama_layer_is_five_kernels() -> None:
    graph = lowered("llama")
    inside = [node.meta["region"] for node in graph.calls() if node.meta.get("region") and node.name.startswith("l1_")]
    assert len(set(inside)) == 5
    assert [region.name for region in dict.fromkeys(inside)] == ["qkv", "attention", "o_proj", "gate_up", "down_proj"]


def test_a_wrong_kernel_is_noticed(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    kernel = next(item for item in emit_kernels(lowered("llama")) if item.name == "gate_up")
    (depth,) = {node.meta["type"].shape[1] for node in kernel.graph.inputs() if node.name == "gate_up_weight_scaled"}
    broken = kernel.source.replace(f"(k < {depth})", f"(k < {depth - 1})")  # the last column of K is dropped
    assert broken != kernel.source
    path = tmp_path / "gate_up.py"
    path.write_text(broken)
    assert max(pool.submit(interpreted, str(path), str(kernel.graph)).result()) > 1e-5


ONE_COLUMN = """\
def gate(x: f32[T, 48], *, T: dim(1, 64)):
    w: f32[1, 48] = weight("w")
    with kernel("gate"):
        y: f32[T, 1] = aten.linear(x, w)
        z: f32[T, 1] = aten.sigmoid(y)
    return z
"""


def test_a_projection_to_one_column(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    (kernel,) = emit_kernels(parse(ONE_COLUMN))
    assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5


POINTWISE = """\
def work(x: f32[T, 7], y: f32[T, 7], *, T: dim(1, 64)):
    with kernel("work"):
        a: f32[T, 7] = {call}
        b: f32[T, 7] = aten.add.Tensor(a, y)
    return b
"""
CALLS = {
    "aten.pow.Tensor_Scalar": "(x, 3)",
    "aten.to.dtype": "(x, f32)",
    "aten.clamp": "(x, -0.5, 0.5)",
    "aten.clamp_min": "(x, 0.1)",
    "aten.clamp_max": "(x, 0.1)",
    "aten.rsub.Scalar": "(x, 2.0)",
    "nn.gelu_mul": '(x, y, "tanh")',
}
_BINARY = ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum", "minimum", "clamp.Tensor"]
# Their operands or results are truth values; they are tried by the families that use them.
_BOOLEAN = tuple(
    f"aten.{name}"
    for name in ("eq.", "ne.", "lt.", "le.", "gt.", "ge.", "logical_", "bitwise_not", "where.", "masked_fill.")
)
_POSITIVE = ("log", "sqrt", "rsqrt")


@pytest.mark.parametrize("op", sorted(name for name in TILE_POINTWISE if not name.startswith(_BOOLEAN)))
def test_pointwise_operator(op: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Each operator that grouping may put into a kernel prints as an expression that computes it."""
    binary = op.removeprefix("aten.") in _BINARY or op.startswith("nn.")
    call = op + CALLS.get(op, "(x, y)" if binary else "(x)")
    text = POINTWISE.format(call=call)
    if any(word in op for word in _POSITIVE):
        positive = "        q: f32[T, 7] = aten.abs(x)\n        p: f32[T, 7] = aten.add.Tensor(q, 0.25)\n        a:"
        text = text.replace(f"{op}(x)", f"{op}(p)").replace("        a:", positive)
    (kernel,) = emit_kernels(parse(text))
    assert any(op_name(node.target) == op for node in kernel.graph.calls())
    assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) <= 1e-5


TRUTH = """\
def truth(x: f32[T, 7], c: i64[T, 7], *, T: dim(1, 64)):
    b: bool[T, 7] = aten.to.dtype(c, bool)
    n: bool[T, 7] = aten.bitwise_not(b)
    y: f32[T, 7] = aten.masked_fill.Scalar(x, n, -inf)
    f: f32[T, 7] = aten.floor(x)
    d: bool[T, 7] = aten.to.dtype(f, bool)
    e: bool[T, 7] = aten.bitwise_not(d)
    return [y, b, n, d, e]
"""


def test_numbers_become_truth_values(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    (step,) = passes.steps(parse(TRUTH), ["GroupKernels"])
    kernels = emit_kernels(step.graph)
    assert len(kernels) == 2
    for kernel in kernels:
        assert max(pool.submit(interpreted, str(write(kernel, tmp_path)), str(kernel.graph)).result()) == 0


@pytest.mark.parametrize("call", ["clamp(x, max=0.5)", "clamp.Tensor(x, min=y)", "softplus(x, beta=2.0)"])
def test_arguments_by_name_are_left_to_torch(call: str) -> None:
    """Kernels are printed from arguments in order; graphs that are traced have no others, those written by hand may."""
    graph = parse(POINTWISE.format(call=f"aten.{call}").replace('with kernel("work"):', "").replace("        ", "    "))
    (step,) = passes.steps(graph, ["GroupKernels"])
    assert [kernel.name for kernel in emit_kernels(step.graph)] == ["b"]
    assert any("kernels take arguments in order, not by name: " in item.why for item in step.report.refused)
