"""Tiny seeded models of as many causal-LM families as transformers has, and of configurations a user may choose.

``FAMILIES`` maps a name to a model type and what its config changes; ``make(name)`` builds the model. Sizes are small,
odd where they may be (99 tokens of vocabulary, 6 heads of 16 on a hidden size of 48), and windows are shorter than the
prompts. Weights are drawn so that activations stay near 1 and scores are spread: a wrong mask, scale or bias shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Tiny values under the names that configs use; each is set where the config of a family has that name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"], 48),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"], 64),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 6),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 6),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 24),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 99),
    **dict.fromkeys(["num_experts_per_tok", "num_key_value_heads", "moe_k", "eos_token_id"], 2),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "v_head_dim"], 12),
    **dict(head_dim=16, sliding_window=5, rotary_dim=4, qk_nope_head_dim=8, qk_rope_head_dim=4, bos_token_id=1),
    **dict(hidden_size_per_layer_input=8, laurel_rank=8, pad_token_id=0),
}

# The families that must compile.
REQUIRED = ("llama qwen2 qwen3 mistral gemma2 gemma3_text phi3 gpt2 opt mixtral qwen3_moe gpt_oss").split()


@dataclass(frozen=True)
class Family:
    """A model type and what its tiny config sets beyond ``SIZES``; ``...`` takes a value of ``SIZES`` away."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LATENT = {"num_key_value_heads": 6, "head_dim": 4}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8]}
_LONG = _rope("longrope", **_FACTORS)

# What a family needs so that its tiny config is valid and its interesting parts are switched on.
_NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "youtu",
        ],
        _LATENT,
    ),
    "minicpm3": {"num_key_value_heads": 6},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss": _rope("default"),
    "phi3": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 5, "norm_topk_prob": True},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "ministral": {"head_dim": 16, **_SLIDING_FULL},
    "helium": {"head_dim": 8},
    "falcon": {"head_dim": ...},
    "gemma4_text": {"global_head_dim": 24},
    "bailing_hybrid": {**_LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"num_key_value_heads": 6, "layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "codegen": {"num_attention_heads": 4, "hidden_size": 64, "rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 48,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 6, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    "bamba": {"mamba_n_heads": 6, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 3, **_SLIDING_FULL},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "axk1": {**_LATENT, "n_group": 2, "topk_group": 1},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2},
    "xlnet": {"max_position_embeddings": ...},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        **_SLIDING_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    **dict.fromkeys(
        ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"],
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "sliding_window": ...},
}

# Families that cannot be made small from their config, or need packages beside transformers.
_LEFT_OUT = frozenset(
    (
        "blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified "
        "gemma4_unified_assistant git got_ocr2 llama4 mllama moshi musicgen musicgen_melody phi4_multimodal "
        "qwen3_5 qwen3_5_moe qwen4_exp qwen4_exp_text whisper moss_transcribe_diarize cpmant xlstm xmod reformer zamba "
        "zamba2 dots3_note_text gemma4_unified_text"
    ).split()
)

# Configurations of common families: one thing changed in each.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 6}),
    "llama-head-dim-20": ("llama", {"head_dim": 20}),
    "llama-head-dim-2": ("llama", {"head_dim": 2}),
    "llama-one-head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48}),
    "llama-one-layer": ("llama", {"num_hidden_layers": 1}),
    "llama-three-layers": ("llama", {"num_hidden_layers": 3}),
    "llama-vocab-257": ("llama", {"vocab_size": 257}),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-yarn": ("llama", _YARN),
    "llama-yarn-attention-factor": (
        "llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3),
    ),
    "llama-llama3": ("llama", _LLAMA3),
    "llama-dynamic": ("llama", _rope("dynamic", factor=4.0)),
    "llama-longrope": ("llama", {**_LONG, "original_max_position_embeddings": 32}),
    "llama-pretraining-tp": ("llama", {"pretraining_tp": 2}),
    **{
        f"llama-{act}": ("llama", {"hidden_act": act})
        for act in (
            "gelu gelu_new gelu_pytorch_tanh gelu_10 quick_gelu relu relu2 mish sigmoid tanh leaky_relu laplace "
            "relu6 swish prelu xielu"
        ).split()
    },
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
    "qwen2-layer-types": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, **_SLIDING_FULL}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}),
    "qwen3_moe-dense-first": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe-top-1": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "qwen3_moe-all-experts": ("qwen3_moe", {"num_experts_per_tok": 4, "num_experts": 4, "norm_topk_prob": False}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-window-1": ("mistral", {"sliding_window": 1}),
    "mistral-window-64": ("mistral", {"sliding_window": 64}),
    "mistral-head-dim-24": ("mistral", {"head_dim": 24}),
    "mixtral-jitter": ("mixtral", {"router_jitter_noise": 0.1}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "mixtral-top-1": ("mixtral", {"num_experts_per_tok": 1}),
    "gemma2-no-softcap": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-small-softcap": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma2-attention-bias": ("gemma2", {"attention_bias": True}),
    "gemma3_text-linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gemma3_text-bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma3_text-softcap": ("gemma3_text", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "phi3-window": ("phi3", {"sliding_window": 5}),
    "phi3-partial": ("phi3", _rope("default", partial_rotary_factor=0.5)),
    "phi3-longrope": (
        "phi3",
        {
            **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[1.0, 3, 5, 7]),
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3-longrope-short": (
        "phi3",
        {
            **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[1.0, 3, 5, 7]),
            "original_max_position_embeddings": 128,
        },
    ),
    "phi-partial": ("phi", _rope("default", partial_rotary_factor=0.25)),
    "phi-qk-layernorm": ("phi", {"qk_layernorm": True}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-inverse-upcast": ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-no-scale": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-project": ("opt", {"word_embed_proj_dim": 24}),
    "opt-no-bias": ("opt", {"enable_bias": False}),
    "opt-plain-norms": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt-gelu": ("opt", {"activation_function": "gelu", "_remove_final_layer_norm": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-partial": ("gpt_neox", _rope("default", partial_rotary_factor=0.25)),
    "gpt_oss-yarn": ("gpt_oss", _rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False)),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "bias": True, "multi_query": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "olmo-clip": ("olmo", {"clip_qkv": 0.5}),
    "granite-multipliers": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3},
    ),
    "starcoder2-window": ("starcoder2", {"sliding_window": 5}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "deepseek_v3-groups": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
    ),
    "deepseek_v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "llama4_text-chunked": (
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attn_temperature_tuning": True,
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
    ),
    "gemma3n_text-shared-kv": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma4_text-shared-kv": (
        "gemma4_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma4_text-experts": (
        "gemma4_text",
        {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 24, "num_experts": 4},
    ),
    "granitemoehybrid-attention": ("granitemoehybrid", {"layer_types": ["attention", "attention"]}),
    "cohere2-all-sliding": ("cohere2", {"layer_types": ["sliding_attention", "sliding_attention"]}),
    **{
        f"{kind}-decoder": (kind, {"is_decoder": True})
        for kind in (
            "bert bert-generation roberta camembert electra ernie data2vec-text roc_bert megatron-bert rembert "
            "roberta-prelayernorm xlm-roberta xlm-roberta-xl big_bird bart mbart pegasus marian blenderbot "
            "blenderbot-small plbart mvp trocr bigbird_pegasus"
        ).split()
    },
    "minimax-full": ("minimax", {"layer_types": ["full_attention", "full_attention"]}),
    "lfm2-conv": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "exaone4-window": ("exaone4", {"sliding_window": 5, **_SLIDING_FULL}),
    "qwen2_moe-window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}

FAMILIES: dict[str, Family] = {
    **{kind: Family(kind, _NEEDS.get(kind, {})) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in _LEFT_OUT},
    **{name: Family(kind, {**_NEEDS.get(kind, {}), **more}) for name, (kind, more) in _VARIANTS.items()},
}


def config(family: Family) -> PreTrainedConfig:
    """The tiny config of a family."""
    usual = AutoConfig.for_model(family.kind)
    changes = {name: size for name, size in SIZES.items() if _has(usual, name)} | family.changes
    return AutoConfig.for_model(family.kind, **{name: value for name, value in changes.items() if value is not ...})


def _has(usual: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(usual, name, None) is not None
    except Exception:  # each layer has a value of its own
        return True


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family with eager attention, seeded, in evaluation mode."""
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config(FAMILIES[name]), attn_implementation="eager")
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")
    randomize(made, seed)
    return made.to(dtype).eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw all weights: matrices keep activations near 1, vectors and saved buffers move away from their defaults."""
    generator = torch.Generator().manual_seed(seed + 1)
    saved = model.state_dict(keep_vars=True)
    done: set[int] = set()
    with torch.no_grad():
        for item in saved.values():
            if id(item) in done or not item.is_floating_point():
                continue
            done.add(id(item))
            noise = torch.randn(item.shape, generator=generator)
            if item.dim() > 1:
                fan_in = math.prod(item.shape[1:]) if item.dim() == 2 else math.sqrt(item.shape[-1] * item.shape[-2])
                item.copy_(noise * 1.4 / math.sqrt(max(1, fan_in)))
            else:
                item.copy_(torch.nan_to_num(item, 0.0, 0.0, 0.0) + noise * 0.2)
