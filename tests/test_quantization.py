"""Weights in few bits: the bytes of a scheme, the pass that asks for them by name, and whole models against numpy."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import fake_quantised, restored, rounded, wide
from typer.testing import CliRunner

import fuseline
from fuseline.codegen.check import errors, random_case
from fuseline.codegen.kernels import Kernel, emit_kernels
from fuseline.codegen.offline import check_file, load_kernel_file
from fuseline.ir.parse import ParseError, parse
from fuseline.ir.quantized import dequantize, quantize, unpack
from fuseline.ir.schemes import scheme_of
from fuseline.ir.types import TensorType
from fuseline.passes import PASSES, PassReport, run
from fuseline.runtime.cli import app
from fuseline.runtime.options import OptionError, quantization_of, resolve_quantization

SCHEMES = ["int8", "int8g128", "int8g32", "int4g128", "int4g64", "int4g32", "uint4g128", "uint4g64", "uint4g32"]
HEAD = 'def block(x: f32[T, 64], *, T: dim(1, 64), quantization: option("{wanted}")):\n'
BODY = """\
    a: f32[32, 64] = weight("layers.0.mlp.up_proj.weight")
    b: f32[64, 32] = weight("layers.0.mlp.down_proj.weight")
    c: f32[99, 64] = weight("lm_head.weight")
    up: f32[T, 32] = aten.linear(x, a)
    down: f32[T, 64] = aten.linear(up, b)
    logits: f32[T, 99] = aten.linear(down, c)
    return logits
"""


def matrix(rows: int, depth: int, seed: int = 0) -> torch.Tensor:
    """Rows of different magnitude, not centred; the first is all zeros but for the last group of 32."""
    found = (
        torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, rows)[:, None]
    )
    found += 0.3 * found.abs().amax(1, keepdim=True)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_factors_are_those_of_the_definition(name: str, seed: int) -> None:
    scheme, values = scheme_of(name), matrix(7, 384, seed)
    assert scheme is not None
    packed = quantize(values, scheme)
    assert packed.shape == (7, scheme.row_bytes(384)) and packed.dtype == torch.uint8 and packed.shape[1] % 16 == 0
    codes, factors, zeros = unpack(packed, scheme, 384)
    wanted = rounded(values.numpy(), name)
    np.testing.assert_array_equal(codes.numpy(), wanted[0])
    np.testing.assert_array_equal(factors.numpy(), wanted[1])
    assert (zeros is None) == (wanted[2] is None)
    if zeros is not None and wanted[2] is not None:
        np.testing.assert_array_equal(zeros.numpy(), wanted[2])
    found = dequantize(packed, TensorType(name, (7, 384)), torch.float32)
    np.testing.assert_array_equal(found.numpy(), restored(*wanted))
    spread = factors.repeat_interleave(384 // factors.shape[1], 1)
    limit = 0.5 if not scheme.zeros else 1.0  # a zero point is rounded as well
    assert bool(((found - values).abs() <= limit * spread * 1.0001).all())


@pytest.mark.parametrize("name", [*SCHEMES, "int8d", "fp8"])
def test_long_rows_begin_at_cache_lines(name: str) -> None:
    scheme = scheme_of(name)
    assert scheme is not None
    for depth in (4096, 5120, 8192, 11008, 14336):
        length, used = scheme.row_bytes(depth), scheme.zeros_at(depth) + scheme.zeros * scheme.groups(depth)
        assert length % 64 == 0 and 0 <= length - used <= used // 32
    assert scheme_of("fp8").row_bytes(4096) % 128 == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_of_zeros_stays_one(name: str) -> None:
    scheme = scheme_of(name)
    assert scheme is not None
    packed = quantize(torch.zeros(3, 128), scheme)
    assert not dequantize(packed, TensorType(name, (3, 128)), torch.float32).any()


def quantised(wanted: str) -> tuple[str, PassReport]:
    report = PassReport("Quantize")
    made = PASSES["Quantize"](parse(HEAD.format(wanted=wanted) + BODY), report)
    fuseline.ir.verify(made)
    text = fuseline.ir.dump(made)
    assert fuseline.ir.dump(parse(text)) == text
    return text, report


def test_the_output_projection_stays_unless_it_is_named() -> None:
    text, report = quantised("*: int8")
    assert report.fused == ["up", "down"] and [item.site for item in report.refused] == ["logits"]
    assert 'a_int8: int8[32, 64] = nn.quantize(a, "int8")' in text
    text, report = quantised("*.lm_head: int8, *: int4g32")
    assert report.fused == ["up", "down", "logits"]
    assert "c_int8: int8[99, 64]" in text and "b_int4g32: int4g32[64, 32]" in text


def test_the_first_pattern_that_fits_decides() -> None:
    text, report = quantised("*.down_proj: none, *_proj: int4g64")
    assert report.fused == ["up"] and "int4g64[32, 64]" in text


@pytest.mark.parametrize(
    "wanted, why",
    [
        (
            "*: int4g64",
            "layers.0.mlp.down_proj.weight cannot be int4g64.*rows of 32 are no multiple of the group of 64",
        ),
        ("*.q_proj: int8", "'\\*.q_proj' fits the name of no projection"),
    ],
)
def test_what_cannot_be_held_is_refused(wanted: str, why: str) -> None:
    with pytest.raises(fuseline.UnsupportedModelError, match=why):
        run(parse(HEAD.format(wanted=wanted) + BODY), ["Quantize"])


@pytest.mark.parametrize(
    "quantization, why",
    [
        ("int3", "no scheme 'int3'"),
        (8, "not 8"),
        ({"*": "int5"}, "no scheme 'int5'"),
        ({"a, b": "int8"}, "'a, b' is no pattern"),
    ],
)
def test_options_that_make_no_sense(quantization: Any, why: str) -> None:
    with pytest.raises(OptionError, match=re.escape(why)):
        fuseline.compile("nowhere", quantization=quantization)


def test_a_type_of_rows_that_do_not_fit_is_refused_by_inference() -> None:
    text = 'def f(x: f32[T, 40], *, T: dim(1, 8)):\n    w: f32[8, 40] = weight("w")\n'
    text += '    q: int4g32[8, 40] = nn.quantize(w, "int4g32")\n    y: f32[T, 8] = aten.linear(x, q)\n    return y\n'
    with pytest.raises(fuseline.VerificationError, match="no multiple of the group of 32"):
        fuseline.ir.verify(parse(text))
    with pytest.raises(ParseError, match="unknown element type int4g33"):
        parse(text.replace("int4g32[", "int4g33["))


PROMPTS = [[5, 17, 3, 88, 41, 2, 9], [7, 7, 61]]


def distance(model: Any, compiled: Any) -> float:
    """The relative RMSE between the logits of a model and of a compiled one."""
    found, wanted = [], []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            wanted.append(model(tokens).logits.double().flatten())
        found.append(compiled(tokens).logits.double().flatten())
    left, right = torch.cat(found), torch.cat(wanted)
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("scheme", ["int8", "int4g32", "uint4g32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi3", "opt"])
def test_logits_are_those_of_weights_rounded_by_numpy(family: str, scheme: str) -> None:
    model = wide(family)
    compiled = fuseline.compile(model, quantization=scheme, device="cpu", max_batch_size=2, max_step_tokens=32)
    twin = fake_quantised(model, scheme)
    assert distance(twin, compiled) < 1e-4 < distance(model, compiled)
    single = [
        twin.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        for prompt in PROMPTS
    ]
    wanted = [row[0, len(prompt) :].tolist() for row, prompt in zip(single, PROMPTS)]
    assert compiled.generate(PROMPTS, max_new_tokens=6, stop_token_ids=[]) == wanted


def test_patterns_reach_single_layers_of_a_deep_model() -> None:
    model = wide("llama-three-layers")
    wanted = {"model.layers.1.*": None, "*.down_proj": "int4g32", "*": "int8"}
    compiled = fuseline.compile(model, quantization=wanted, device="cpu", max_batch_size=2, max_step_tokens=32)
    twin = fake_quantised(model, "int8", lambda name: "layers.1." not in name and "down_proj" not in name)
    twin = fake_quantised(twin, "int4g32", lambda name: "layers.1." not in name and "down_proj" in name)
    assert distance(twin, compiled) < 1e-4 < distance(model, compiled)


def test_the_report_counts_bytes_by_scheme() -> None:
    model = wide("llama")
    compiled = fuseline.compile(model, quantization="int4g32", device="cpu", max_batch_size=1, max_step_tokens=32)
    scheme = scheme_of("int4g32")
    assert scheme is not None
    projections = [item for item in model.model.layers.modules() if isinstance(item, torch.nn.Linear)]
    expected = sum(item.out_features * scheme.row_bytes(item.in_features) for item in projections)
    held = compiled.report.bytes_by_type
    assert held["int4g32"] == expected and sum(held.values()) == compiled.report.weight_bytes
    assert "int4g32" in str(compiled.report) and compiled.report.as_dict()["weight_bytes_by_type"] == held


@pytest.mark.parametrize("scheme", ["int8", "int4g32", "uint4g32"])
@pytest.mark.parametrize("family, seed", [("mixtral", 0), ("qwen3_moe", 1), ("gpt_oss", 2)])
def test_experts_are_those_of_weights_rounded_by_numpy(family: str, seed: int, scheme: str) -> None:
    """Those of gpt_oss lie the other way round and have biases. Routers stay as they are."""
    model = wide(family, seed)
    compiled = fuseline.compile(model, quantization=scheme, device="cpu", max_batch_size=2, max_step_tokens=32)
    twin = fake_quantised(model, scheme)
    assert distance(twin, compiled) < 1e-4 < distance(model, compiled)
    held, kind = compiled.report.bytes_by_type, scheme_of(scheme)
    experts = {name: item for name, item in model.named_parameters() if ".experts." in name and item.dim() == 3}
    types = re.findall(rf"{scheme}\[\d+, \d+, \d+\]", str(compiled.graph))
    assert kind is not None and len(types) >= len(experts) > 0
    assert held[scheme] > sum(item.numel() for item in experts.values()) * kind.bits / 8


def test_a_pattern_reaches_one_weight_of_experts() -> None:
    model = wide("mixtral", 3)
    wanted = {"*.experts.gate_up_proj": "int4g32"}
    compiled = fuseline.compile(model, quantization=wanted, device="cpu", max_batch_size=2, max_step_tokens=32)
    assert distance(fake_quantised(model, "int4g32", lambda name: "gate_up" in name), compiled) < 1e-4
    text = str(compiled.graph)
    assert "experts_gate_up_proj_int4g32" in text and "down_proj_int4g32" not in text


def test_a_router_is_rounded_only_if_it_is_named() -> None:
    model = wide("mixtral")
    choices: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "max_step_tokens": 32}
    assert "gate_weight_int8" not in str(fuseline.compile(model, quantization="int8", **choices).graph)
    named = fuseline.compile(model, quantization={"*.gate": "int8", "*": None}, **choices)
    assert "gate_weight_int8" in str(named.graph) and "experts_gate_up_proj_int8" not in str(named.graph)


def test_what_experts_cannot_be_held_in_is_refused() -> None:
    why = "rows of 96 are no multiple of the group of 128.*'\\*.experts': None"
    with pytest.raises(fuseline.UnsupportedModelError, match=why):
        fuseline.compile(wide("mixtral"), quantization={"*.experts*": "int4g128"}, device="cpu")


def test_every_pass_and_kernel_keeps_the_numbers_of_experts() -> None:
    compiled = fuseline.compile(
        wide("mixtral"), quantization="int4g32", device="cpu", max_batch_size=2, max_step_tokens=32, verify=True
    )
    assert "every pass keeps the numbers" in compiled.report.verification


@pytest.mark.parametrize("scheme", ["int8", "int8g32", "int4g32", "uint4g32"])
def test_every_pass_and_kernel_keeps_the_numbers(scheme: str, tmp_path: Path) -> None:
    compiled = fuseline.compile(
        wide("llama"),
        quantization=scheme,
        device="cpu",
        max_batch_size=2,
        max_step_tokens=32,
        verify=True,
        dump=tmp_path,
    )
    assert "every pass keeps the numbers" in compiled.report.verification
    again = fuseline.compile(
        parse(sorted(tmp_path.glob("*_Quantize.txt"))[0].read_text()), weights=wide("llama"), device="cpu"
    )
    assert again.generate(PROMPTS, max_new_tokens=4) == compiled.generate(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("scheme", ["int8", "int8g32", "int4g32", "uint4g32"])
def test_kernels_compile_without_spills(scheme: str, tmp_path: Path) -> None:
    compiled = fuseline.compile(
        wide("llama").bfloat16(), quantization=scheme, device="cpu", dtype="bfloat16", max_batch_size=2
    )
    kernels: list[Kernel] = [
        item for item in compiled.kernels if "aten.linear" in item.source and scheme in item.source
    ]
    assert len(kernels) == 4
    for kernel in kernels:
        path = tmp_path / f"{kernel.name}.py"
        path.write_text(kernel.source)
        assert all(not found.spill_bytes for found in check_file(path, [90]))


def test_a_command_line_states_schemes_by_pattern() -> None:
    assert quantization_of("int4") == "int4"
    wanted = quantization_of("*.down_proj=int8,*.o_proj=none,*=int4")
    assert wanted == {"*.down_proj": "int8", "*.o_proj": None, "*": "int4"}
    assert resolve_quantization(wanted) == {"*.down_proj": "int8", "*.o_proj": None, "*": "int4g128"}


def test_the_commands_take_schemes(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "model")
    for command, shown in (("dump", 'nn.quantize(l0_qkv_weight, "int4g32")'), ("explain", "Quantize")):
        done = CliRunner().invoke(
            app, [command, str(tmp_path / "model"), "--device", "cpu", "--quantization", "*=int4g32"]
        )
        assert done.exit_code == 0 and shown in done.stdout, done.output


def test_a_product_of_activations_is_no_projection() -> None:
    text = 'def f(x: f32[T, 8], *, T: dim(1, 8), quantization: option("*: int8")):\n    w: f32[8, 8] = weight("w")\n'
    text += "    h: f32[T, 8] = aten.linear(x, w)\n    y: f32[T, T] = aten.linear(x, h)\n"
    text += "    z: f32[T, T] = aten.tanh(y)\n    return [h, z]\n"
    report = PassReport("Quantize")
    fuseline.ir.verify(PASSES["Quantize"](parse(text), report))
    assert report.fused == ["h"]


PROJECTION = """\
def {name}(x: f32[T, {depth}], w: {scheme}[48, {depth}], r: f32[T, 48], *, T: dim(1, 64)):
    with kernel("{name}"):
        n: f32[T, {depth}] = nn.rms_norm(x, None, 1e-06)
        y: f32[T, 48] = aten.linear(n, w)
        z: f32[T, 48] = aten.add.Tensor(y, r)
    return z
"""


def library_error(path: str, text: str) -> float:
    """The error of the library's product of a weight in codes; runs where Triton interprets."""
    graph, module = parse(text), load_kernel_file(path)
    launch = partial(module.launch, choices=((None, len(module.CONFIGS)),))
    module.CONFIGS.append(module.LIBRARY)
    case = random_case(graph, 3, 3, seed=7, device="cpu")
    return max(errors(graph, launch, Kernel(graph.name, "", graph).order, case))


@pytest.mark.parametrize(
    ("scheme", "depth"), [("int8", 520), ("int8", 72), ("int8g32", 544), ("int4g32", 1056), ("uint4g64", 128)]
)
def test_the_library_multiplies_the_numbers_of_a_weight(
    scheme: str, depth: int, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    graph = run(parse(PROJECTION.format(name=f"project_{scheme}", scheme=scheme, depth=depth)), [])
    (kernel,) = emit_kernels(graph)
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    assert pool.submit(library_error, str(path), str(kernel.graph)).result() <= 1e-5
