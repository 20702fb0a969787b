"""Schemes that round activations as well: codes by the definition, whole models against numpy, and their kernels."""

from __future__ import annotations

import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import fake_quantised, nearest_e4m3, restored, rounded, wide
from test_quantization import PROMPTS, matrix, quantised

import fuseline
from fuseline.codegen.check import errors, random_case
from fuseline.codegen.kernels import Kernel, emit_kernels
from fuseline.codegen.offline import check_file, compile_variant, load_kernel_file
from fuseline.ir.graph import Graph
from fuseline.ir.parse import parse
from fuseline.ir.quantized import dequantize, quantize, unpack
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.passes import run
from fuseline.runtime import options
from fuseline.runtime.options import OptionError, refuse_schemes, resolve_quantization

# The names in types, and those that a caller uses.
SCHEMES = {"int8d": "int8-dynamic", "fp8": "fp8"}


@pytest.mark.parametrize("depth", [384, 40])
@pytest.mark.parametrize(("name", "tries"), [("int8d", 1), ("fp8", 1), ("fp8", 16)])
def test_codes_and_factors_are_those_of_the_definition(name: str, tries: int, depth: int) -> None:
    scheme, values = scheme_of(name), matrix(7, depth)
    values[3] = 0
    values[4, 1:] *= 1e-4  # E4M3 numbers without an exponent
    assert scheme is not None and scheme.dynamic
    packed = quantize(values, scheme, tries)
    assert packed.shape == (7, scheme.row_bytes(depth)) and packed.shape[1] % 16 == 0
    codes, factors, zeros = unpack(packed, scheme, depth)
    wanted = rounded(values.numpy(), SCHEMES[name], tries)
    assert zeros is None and codes.element_size() == 1
    np.testing.assert_array_equal(codes.float().numpy(), wanted[0])
    np.testing.assert_array_equal(factors.numpy(), wanted[1])
    found = dequantize(packed, TensorType(name, (7, depth)), torch.float32)
    np.testing.assert_array_equal(found.numpy(), restored(*wanted))


def test_e4m3_numbers_are_their_own_nearest() -> None:
    """All of them, so that the definition that the others are tested with is right itself."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    assert len(numbers) == 254 and numbers.max() == 448
    np.testing.assert_array_equal(nearest_e4m3(numbers.numpy()), numbers.numpy())
    between = torch.linspace(-448, 448, 20001)
    np.testing.assert_array_equal(nearest_e4m3(between.numpy()), between.to(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_graph_says_what_is_rounded(name: str) -> None:
    text, report = quantised(f"*: {name}")
    assert report.fused == ["up", "down"]
    assert f'x_{name}: {name}[T, 64] = nn.quantize(x, "{name}")' in text
    weight = 'nn.quantize(a, "fp8", 16)' if name == "fp8" else 'nn.quantize(a, "int8d")'
    assert f"a_{name}: {name}[32, 64] = {weight}" in text
    assert f"up: f32[T, 32] = nn.scaled_linear(x_{name}, a_{name}, None, f32)" in text
    again, _ = quantised(f"*.up_proj: {name}, *: int8")
    assert "down: f32[T, 64] = aten.linear(up, b_int8)" in again


def distance(model: Any, compiled: Any) -> float:
    """The relative RMSE between the logits of a model and of a compiled one, for the middle one of many rows.

    Of the thousand numbers that are rounded on the way to a row, one may lie so near half-way between two codes that the
    order of a sum decides. That changes its row, and those behind it a little.
    """
    errors = []
    for prompt in torch.randint(0, 99, (12, 3), generator=torch.Generator().manual_seed(3)):
        with torch.no_grad():
            wanted = model(prompt[None]).logits[0].double()
        found = compiled([prompt.tolist()]).logits[0].double()
        errors += ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).tolist()
    return statistics.median(errors)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_weights_and_rows_rounded_by_numpy(family: str, scheme: str) -> None:
    model = wide(family)
    compiled = fuseline.compile(model, quantization=scheme, device="cpu", max_batch_size=2, max_step_tokens=32)
    twin = fake_quantised(model, scheme)
    assert distance(twin, compiled) < 1e-4 < distance(model, compiled)


def test_schemes_by_pattern() -> None:
    model = wide("llama")
    wanted = {"*.down_proj": "fp8", "*.q_proj": "int8-dynamic", "*.o_proj": None, "*": "int8"}
    compiled = fuseline.compile(model, quantization=wanted, device="cpu", max_batch_size=2, max_step_tokens=32)
    twin = fake_quantised(model, "fp8", lambda name: "down_proj" in name)
    twin = fake_quantised(twin, "int8-dynamic", lambda name: "q_proj" in name)
    twin = fake_quantised(twin, "int8", lambda name: not re.search("(down|q|o)_proj", name))
    assert distance(twin, compiled) < 1e-4 < distance(model, compiled)
    assert {"fp8", "int8d", "int8", "f32"} == set(compiled.report.bytes_by_type)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
def test_steps_of_which_no_row_is_asked_for(scheme: str, ranks: int) -> None:
    """The pieces of a long prompt but the last: the output projection has no rows to round."""
    given: dict[str, Any] = {"quantization": {"*.lm_head": scheme, "*": scheme}, "device": "cpu", "max_batch_size": 2}
    whole = fuseline.compile(wide("llama"), max_step_tokens=64, **given)
    pieces = fuseline.compile(wide("llama"), max_step_tokens=4, tensor_parallel=ranks, simulate=ranks > 1, **given)
    prompts = [list(range(3, 18))]
    assert pieces.generate(prompts, max_new_tokens=4) == whole.generate(prompts, max_new_tokens=4)


def test_kernels_in_front_of_experts_round_their_rows() -> None:
    """Those of gate and up once for each token, those of down once for each choice, where they are made."""
    wanted = {"*.experts.*": "fp8"}
    compiled = fuseline.compile(
        wide("mixtral"), quantization=wanted, device="cpu", max_batch_size=2, max_step_tokens=32
    )
    made = {kernel.name: str(kernel.graph) for kernel in compiled.kernels}
    assert 'fp8[T, 96] = nn.quantize(mul, "fp8")' in made["norm"]
    assert "nn.silu_mul" in made["activation"] and "fp8[T, 2, 160] = nn.quantize(" in made["activation"]
    experts = [text for name, text in made.items() if name.startswith("experts")]
    assert len(experts) == 2 and all(text.count("nn.") == 1 for text in experts)
    assert not [name for name in compiled.report.other_operators if "quantize" in name]


@pytest.mark.parametrize(("family", "scheme"), [("gpt_oss", "int8-dynamic"), ("qwen3_moe", "fp8")])
def test_every_pass_and_kernel_keeps_the_numbers_of_experts(family: str, scheme: str) -> None:
    given: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "max_step_tokens": 32}
    compiled = fuseline.compile(wide(family), quantization=scheme, verify=True, **given)
    assert "every pass keeps the numbers" in compiled.report.verification


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8"])
def test_every_pass_and_kernel_keeps_the_numbers(scheme: str, tmp_path: Path) -> None:
    given = {"device": "cpu", "max_batch_size": 2, "max_step_tokens": 32}
    compiled = fuseline.compile(
        wide("llama"), quantization={"*.lm_head": scheme, "*": scheme}, verify=True, dump=tmp_path, **given
    )
    assert "every pass keeps the numbers" in compiled.report.verification
    late = parse(sorted(tmp_path.glob("*_GroupKernels.txt"))[0].read_text())
    again = fuseline.compile(late, weights=wide("llama"), **given)
    assert again.generate(PROMPTS, max_new_tokens=4) == compiled.generate(PROMPTS, max_new_tokens=4)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    cuda = torch.device("cuda")
    with pytest.raises(OptionError, match="fp8 needs .* 8.9; NVIDIA A100 has 8.0"):
        refuse_schemes({"*.o_proj": "int8d", "*": "fp8"}, cuda)
    refuse_schemes({"*": "int8d", "*.up_proj": None}, cuda)
    refuse_schemes({"*": "fp8"}, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    refuse_schemes({"*": "fp8"}, cuda)


def test_names_of_callers() -> None:
    assert resolve_quantization("int8-dynamic") == {"*": "int8d"} and resolve_quantization("fp8") == {"*": "fp8"}
    with pytest.raises(OptionError, match="int8-dynamic, fp8"):
        resolve_quantization("int8d8")
    assert options.quantization_of("*.up_proj=int8-dynamic,*=fp8") == {"*.up_proj": "int8-dynamic", "*": "fp8"}


PROJECTION = """\
def {name}(x: {dtype}[T, {depth}], w: {scheme}[{width}, {depth}], b: {dtype}[{width}], r: {dtype}[T, {width}], *, T: dim(1, 64)):
    with kernel("{name}"):
        n: {dtype}[T, {depth}] = nn.rms_norm(x, None, 1e-06)
        x8: {scheme}[T, {depth}] = nn.quantize(n, "{scheme}")
        y: {dtype}[T, {width}] = nn.scaled_linear(x8, w, b, {dtype})
        z: {dtype}[T, {width}] = aten.add.Tensor(y, r)
    return z
"""


def projection(scheme: str, dtype: str, depth: int = 160, width: int = 48) -> Kernel:
    text = PROJECTION.format(name=f"project_{scheme}", scheme=scheme, dtype=dtype, depth=depth, width=width)
    graph = run(parse(text), [])
    (kernel,) = emit_kernels(graph)
    return kernel


def tilings(path: str, text: str) -> dict[str, float]:
    """The error of each kind of tiling, whatever the number of rows; runs where Triton interprets."""
    graph: Graph = parse(text)
    module = load_kernel_file(path)
    order = Kernel(graph.name, "", graph).order
    own = {
        "row": module.row(2, 64, 4),
        "few": module.few(16, 16, 32, 4, 1, 1),
        "parts": module.few(16, 32, 32, 4, 1, 2),
        "tile": module.tile(32, 32, 64, 4, 1),
        "early": module.tile(16, 16, 32, 4, 1),
    }
    found = {}
    for label, config in own.items():
        module.CONFIGS.append(config)
        launch = partial(module.launch, choices=((None, len(module.CONFIGS) - 1),))
        case = random_case(graph, 3, 3, seed=7, device="cpu")
        found[label] = max(errors(graph, launch, order, case))
    return found


def rounded_rows(path: str, text: str) -> torch.Tensor:
    """Rows of all sizes from 1 down to where fp32 ends, in the bytes of a kernel; runs where Triton interprets."""
    graph = parse(text)
    x = torch.linspace(-1, 1, 64)[None] * 10.0 ** -torch.arange(0.0, 46.0)[:, None]
    (result,) = graph.output_node().args[0]
    packed = torch.zeros(46, result.meta["type"].stored.shape[1], dtype=torch.uint8)
    load_kernel_file(path).launch(x, packed)
    return packed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiny_rows_stay_tiny(scheme: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    body = f'        q: {scheme}[T, 64] = nn.quantize(x, "{scheme}")\n    return q\n'
    text = f'def rows_{scheme}(x: f32[T, 64], *, T: dim(1, 64)):\n    with kernel("rows_{scheme}"):\n{body}'
    (kernel,) = emit_kernels(run(parse(text), []))
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    packed = pool.submit(rounded_rows, str(path), str(kernel.graph)).result()
    found = dequantize(packed, TensorType(scheme, (46, 64)), torch.float32).double()
    x = (torch.linspace(-1, 1, 64)[None] * 10.0 ** -torch.arange(0.0, 46.0)[:, None]).double()
    most = x.abs().amax(1, keepdim=True)
    assert bool(((found - x).abs() <= 0.04 * most + 1e-34).all())
    assert bool((found.abs() <= x.abs() + 0.04 * most).all()), "what is small becomes no large code"


@pytest.mark.parametrize("depth", [160, 72])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_tiling_is_right(scheme: str, depth: int, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    kernel = projection(scheme, "f32", depth)
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    found = pool.submit(tilings, str(path), str(kernel.graph)).result()
    assert {label: error for label, error in found.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize(("scheme", "dtype"), [("int8d", "bf16"), ("fp8", "bf16"), ("fp8", "f32")])
def test_kernels_compile_without_spills(scheme: str, dtype: str, tmp_path: Path) -> None:
    kernel = projection(scheme, dtype, 4096, 4096)
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    assert len(check_file(path, [90])) >= 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensor_cores_multiply_codes_as_they_lie(scheme: str, tmp_path: Path) -> None:
    """Whole 16 bytes go from memory to shared memory, and from there to the tensor cores."""
    kernel = projection(scheme, "bf16", 4096, 4096)
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    module = load_kernel_file(path)
    for config in (module.few(16, 64, 256, 4, 3, 2), module.tile(128, 128, 128, 8, 3)):
        ptx = compile_variant(config, 90).ptx
        kind = "s8.s8" if scheme == "int8d" else "e4m3.e4m3"
        assert re.search(rf"wgmma.mma_async.*{kind}", ptx) and "cp.async.cg.shared.global" in ptx
        assert "e4m3x2" not in ptx
    assert ("_scaled_mm" in kernel.source) == (scheme == "fp8")


def test_the_library_multiplies_codes(tmp_path: Path) -> None:
    """The product that is offered for many rows, here on the CPU."""
    kernel = projection("fp8", "bf16", 160, 48)
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    scheme = scheme_of("fp8")
    assert scheme is not None
    x, w, bias = matrix(33, 160, 1), matrix(48, 160, 2), torch.arange(48).bfloat16()
    found = torch.empty(33, 48, dtype=torch.bfloat16)
    load_kernel_file(path).scaled_product(quantize(x, scheme), quantize(w, scheme), bias, found)
    left, right = (restored(*rounded(item.numpy(), "fp8")) for item in (x, w))
    wanted = left @ right.T + bias.float().numpy()
    assert np.linalg.norm(found.float().numpy() - wanted) < 5e-3 * np.linalg.norm(wanted)
