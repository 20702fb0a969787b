"""Seeded bugs in rules: what they put in place of what they find, read as text like the rules themselves."""

from __future__ import annotations

from mutation_switches import Mutation, after

from fuseline.passes.names import aten, nn


def epsilon_of_another_model(x, eps):
    return nn.rms_norm(x, None, 1e-05)


def no_scale(x, scale, eps):
    return nn.rms_norm(x, None, eps)


def no_bias(x, shape, scale, bias, eps):
    return nn.layer_norm(x, scale, None, eps)


def another_epsilon(x, shape, scale, bias, eps):
    return nn.layer_norm(x, scale, bias, 1e-06)


def no_mean(x, scale, eps):
    return nn.rms_norm(x, scale, eps)


def up_gated(gate, up):
    return nn.silu_mul.default(up, gate)


def tanh_for_erf(gate, up):
    return nn.gelu_mul(gate, up, "tanh")


def erf_for_tanh(gate, up):
    return nn.gelu_mul(gate, up)


def erf_gelu(x):
    return aten.gelu(x)


def interleaved(x, cos, sin, half, width):
    return nn.rope(x, cos, sin, "interleaved")


def sine_first(x, cos, sin, half, width):
    return nn.rope(x, sin, cos, "half")


def mixed_tables(x, cos, sin, half, width):
    return nn.rope(x, aten.cat([cos, cos], -1), aten.cat([sin, cos], -1), "half")


def partial_pairs(x, cos, sin, width, start, end, pairing):
    return nn.rope(x, cos, sin, "interleaved")


def sum_of_one(x, residual, scale, eps):
    both = nn.add_rms_norm(x, residual, scale, eps)
    return x, both[1]


def results_swapped(x, residual, scale, eps):
    both = nn.add_rms_norm(x, residual, scale, eps)
    return both[1], both[0]


def residual_dropped(x, residual, scale, eps):
    both = nn.add_rms_norm(x, residual, scale, eps)
    return both[0], nn.rms_norm(x, scale, eps)


def addmm_without_bias(bias, x, w):
    return aten.linear(x, aten.transpose.int(w, -2, -1))


def bias_twice(bias, x, w):
    return aten.add.Tensor(aten.linear(x, aten.transpose.int(w, -2, -1), bias), bias)


IN_RULES = {
    "epsilon of another model": Mutation("llama", "FuseRMSNorm", after("FuseRMSNorm", epsilon_of_another_model)),
    "norm without its scale": Mutation("llama", "FuseNormScale", after("FuseNormScale", no_scale)),
    "layer norm without its bias": Mutation("gpt2-inverse-layer", "FuseLayerNorm", after("FuseLayerNorm", no_bias)),
    "epsilon of another layer norm": Mutation(
        "gpt2-inverse-layer", "FuseLayerNorm", after("FuseLayerNorm", another_epsilon)
    ),
    "layer norm without its mean": Mutation("cohere2", "FuseWrittenLayerNorm", after("FuseWrittenLayerNorm", no_mean)),
    "gate and up swapped": Mutation("llama", "FuseSiluMul", after("FuseSiluMul", up_gated)),
    "tanh approximation for erf": Mutation("llama-gelu", "FuseGeluMul", after("FuseGeluMul", tanh_for_erf)),
    "erf for the tanh approximation": Mutation("gemma2", "FuseTanhGeluMul", after("FuseTanhGeluMul", erf_for_tanh)),
    "another gelu": Mutation("gpt2-inverse-layer", "FuseTanhGelu", after("FuseTanhGelu", erf_gelu)),
    "rope with the wrong pairing": Mutation("llama", "FuseRope", after("FuseRope", interleaved)),
    "cosine and sine swapped": Mutation("qwen2", "FuseRope", after("FuseRope", sine_first)),
    "one table of rope in place of the other": Mutation(
        "gpt_oss", "FuseSplitRope", after("FuseSplitRope", mixed_tables)
    ),
    "partial rope with the wrong pairing": Mutation("phi", "FusePartialRope", after("FusePartialRope", partial_pairs)),
    "a fused add with two users": Mutation("gpt_oss", "FuseAddRMSNorm", after("FuseAddRMSNorm", sum_of_one)),
    "results of a fused add swapped": Mutation("gpt_oss", "FuseAddRMSNorm", after("FuseAddRMSNorm", results_swapped)),
    "residual dropped": Mutation("gemma2", "FuseAddRMSNorm", after("FuseAddRMSNorm", residual_dropped)),
    "bias dropped": Mutation("gpt2-inverse-layer", "LinearFromAddmm", after("LinearFromAddmm", addmm_without_bias)),
    "bias added twice": Mutation("gpt2-inverse-layer", "LinearFromAddmm", after("LinearFromAddmm", bias_twice)),
}
