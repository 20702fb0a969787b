"""What the compiler says of itself: sites fused, refused and nearly fitting; what is demanded; what is switched off.

If this fails, a fusion can be lost, or be made, without anybody being told.
"""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from deep import make_deep

import fuseline
from fuseline import ir, passes
from fuseline.ir.skeleton import skeleton
from fuseline.runtime.explain import explain
from fuseline.runtime.lower import Lowered, Wishes, lower
from fuseline.runtime.options import KVCacheConfig, Options
from fuseline.runtime.report import Report

CPU = torch.device("cpu")
OPTIONS = Options(CPU, torch.float32, 1, 64, 64, KVCacheConfig())


def lowered(name: str, layers: int = 2, **wishes: Any) -> tuple[Lowered, Report]:
    report = Report("cpu", "float32")
    return lower(skeleton(make_deep(name, layers), torch.float32), OPTIONS, Wishes(**wishes), report), report


# Fused sites for each layer, and kernels of a layer.
COUNTS: dict[str, tuple[dict[str, int], int | None]] = {
    "llama": ({"MergeQKV": 1, "MergeGateUp": 1, "FuseRope": 2, "FuseSiluMul": 1, "FuseNormScale": 2}, 5),
    "qwen3": ({"MergeQKV": 1, "MergeGateUp": 1, "FuseRope": 2, "FuseSiluMul": 1, "FuseNormScale": 4}, 5),
    "gemma2": ({"MergeQKV": 1, "MergeGateUp": 1, "FuseRope": 2, "FuseTanhGeluMul": 1, "FuseAddRMSNorm": 2}, None),
    "gpt2": ({"LinearFromAddmm": 4, "FuseLayerNorm": 2, "FuseTanhGelu": 1}, 5),
    "mixtral": ({"MergeQKV": 1, "FuseRope": 2, "FuseSiluMul": 1, "FuseAddRMSNorm": 1, "FuseNormScale": 2}, None),
    "gpt_oss": ({"MergeQKV": 1, "FuseSplitRope": 2, "FuseAddRMSNorm": 1, "FuseNormScale": 2}, None),
}
# Norms and tables that stand outside of the layers.
ONCE = {"FuseNormScale": 1, "FuseLayerNorm": 1}


@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("name", COUNTS)
def test_every_expected_site_is_fused_or_has_a_reason(name: str, layers: int) -> None:
    counts, kernels = COUNTS[name]
    expect = {rule: count * layers + ONCE.get(rule, 0) for rule, count in counts.items()}
    if kernels:
        expect["kernels_per_layer"] = kernels
    _, report = lowered(name, layers, expect=expect)
    assert set(report.layer_kernels) == set(range(layers))
    for entry in report.passes:
        for item in entry.refused:
            assert item.why and "-->" in item.lines, (entry.name, item)


def test_a_missed_expectation_shows_what_stood_in_the_way() -> None:
    with pytest.raises(fuseline.ExpectationError, match="was to fuse 4 sites and fused 0") as caught:
        lowered("llama", expect={"FuseAddRMSNorm": 4})
    text = str(caught.value)
    assert "l0_add_3: the addition is done by the kernel of the projection that makes l0_o_proj" in text
    assert "--> l0_add_3: f32[T, 48] = aten.add.Tensor(" in text
    with pytest.raises(fuseline.ExpectationError, match=r"layer 0 was to take 4 kernels and takes 5: qkv, attention"):
        lowered("llama", expect={"kernels_per_layer": 4})


NEAR = """\
def f(x: f32[T, 8], *, T: dim(1, 64)):
    p: f32[T, 8] = aten.pow.Tensor_Scalar(x, 3)
    m: f32[T, 1] = aten.mean.dim(p, [-1], True)
    e: f32[T, 1] = aten.add.Tensor(m, 1e-06)
    r: f32[T, 1] = aten.rsqrt(e)
    n: f32[T, 8] = aten.mul.Tensor(x, r)
    return n
"""


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("(x, 3)", "(x, 3)", "p has 3 where 2 is expected"),
        ("pow.Tensor_Scalar(x, 3)", "abs(x)", "m reads p (aten.abs) where aten.pow.Tensor_Scalar is expected"),
        ("f32[T, 8] = aten.mul.Tensor(x, r)", "f32[T, 8] = aten.mul.Tensor(p, r)", "p reads x, not p"),
    ],
)
def test_a_near_miss_names_the_first_thing_that_did_not_fit(old: str, new: str, why: str) -> None:
    (step,) = passes.steps(ir.parse(NEAR.replace(old, new)), ["FuseRMSNorm"])
    assert step.report.found == 0
    ((site, reason, lines),) = [(item.site, item.why, item.lines) for item in step.report.near]
    assert (site, reason) == ("n", why)
    assert "-->" in lines


def test_what_shares_nothing_but_the_last_operator_is_no_near_miss() -> None:
    text = NEAR.replace("aten.mul.Tensor(x, r)", "aten.mul.Tensor(x, x)")
    (step,) = passes.steps(ir.parse(text), ["FuseRMSNorm"])
    assert not step.report.near


def test_passes_and_single_applications_are_switched_off() -> None:
    number = passes.PASSES.pipeline.index("FuseSiluMul") + 1
    for skip in (["FuseSiluMul"], [number], [str(number)]):
        after, report = lowered("llama", skip=skip)
        assert "nn.silu_mul" not in str(after.graph)
        assert report.passes[number - 1].found == 0
    after, report = lowered("llama", skip=["FuseRope#1", "FuseSiluMul#0"])
    entry = next(entry for entry in report.passes if entry.name == "FuseRope")
    assert len(entry.fused) == 3
    assert [item.why for item in entry.refused] == ["switched off (application 1 of FuseRope)"]
    assert str(after.graph).count("nn.silu_mul") == 1
    with pytest.raises(fuseline.passes.UnknownPassError, match="FuseNothing"):
        lowered("llama", skip=["FuseNothing"])
    with pytest.raises(fuseline.OptionError, match="PageAttention cannot be switched off"):
        lowered("llama", skip=["PageAttention"])


def test_a_model_compiled_with_passes_switched_off_says_the_same() -> None:
    model = families.make("llama")
    options: dict[str, Any] = {"device": "cpu", "max_seq_len": 64}
    whole = fuseline.compile(model, **options)
    less = fuseline.compile(model, skip=["FuseRope", "MergeQKV#1", "SinkTransposes", "GroupKernels"], **options)
    assert less.generate([[5, 6, 7]], max_new_tokens=8) == whole.generate([[5, 6, 7]], max_new_tokens=8)


def test_explain_answers_why() -> None:
    after, report = lowered("deepseek_v3-groups")
    text = explain(after.graph, report, layer=1)
    assert "not fused: l1_sum: it is in no kernel: aten.sum.dim_IntList: no kernel takes these arguments" in text
    assert "--> l1_sum: f32[T, 2] = aten.sum.dim_IntList(" in text
    assert 'kernel "route"\n    l1_' in text
    assert "l0_q_a_proj (and 1 like it)" in explain(after.graph, report)
    with pytest.raises(ValueError, match="there is no layer 2: the model has the layers 0 to 1"):
        explain(after.graph, report, layer=2)
