"""What is measured: a real model, or a named shape with random weights made on the device."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...ir.errors import UnsupportedModelError
from ..models import resolve
from ..options import OptionError

PREFIX = "shape:"

_LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Sizes as in the published configs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3, "factor": 32.0},
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3, "factor": 8.0},
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama-2-13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama-2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
}


def shape_config(name: str) -> PretrainedConfig:
    """The config of a named shape, a llama if it does not say otherwise.

    Raises:
        OptionError: there is no shape of that name; lists those there are.
    """
    if name not in SHAPES:
        known = ", ".join(PREFIX + item for item in sorted(SHAPES))
        raise OptionError(f"{PREFIX}{name}: there is no such shape; use one of {known}, or a real model")
    # Matrices drawn with this spread keep the size of what they multiply, so activations stay sane over any depth.
    spread = float(SHAPES[name]["hidden_size"]) ** -0.5
    values = {"model_type": "llama", **SHAPES[name], "initializer_range": spread, "eos_token_id": None}
    return AutoConfig.for_model(**values)


def random_model(
    config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights that are drawn where they stay; the same ones for the same seed, device and type."""
    torch.manual_seed(seed)
    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made.eval()


@dataclass
class Source:
    """A model by its MODEL argument, on ``device`` in ``dtype``.

    ``path`` is what ``transformers`` reads, ``None`` for a shape. ``model()`` is kept until ``release()``.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    path: str | None
    config: PretrainedConfig
    _kept: list[PreTrainedModel] = field(default_factory=list)

    @staticmethod
    def of(name: str, device: torch.device, dtype: torch.dtype) -> Source:
        """Find a model.

        Raises:
            OptionError: an unknown shape. UnsupportedModelError: no model is found there.
        """
        if name.startswith(PREFIX):
            return Source(name, device, dtype, None, shape_config(name.removeprefix(PREFIX)))
        path = resolve(name)
        return Source(name, device, dtype, path, _read(AutoConfig, path))

    @property
    def text(self) -> Any:
        """The config of the language model itself."""
        return self.config.get_text_config()

    def model(self) -> PreTrainedModel:
        """The live ``transformers`` model, with its default attention; it never stops at an end token.

        Raises:
            UnsupportedModelError: it is no causal language model that ``transformers`` can read.
        """
        if not self._kept:
            if self.path is None:
                made = random_model(self.config, self.device, self.dtype)
            else:
                made = _read(AutoModelForCausalLM, self.path, dtype=self.dtype).to(self.device).eval()
            made.generation_config.eos_token_id = None
            self._kept.append(made)
        return self._kept[0]

    def release(self) -> None:
        """Forget the live model, so that its memory is free for others."""
        self._kept.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _read(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{path}: not a causal language model that transformers can read: {reason}"
        ) from error
