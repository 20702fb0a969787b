"""What is done to a model before it is traced: parameters without memory, and attention and experts of our own."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from . import hooks
from .errors import UnsupportedModelError
from .sharing import sharing_copy

# Attention that computes what eager attention computes; another name is a function of the user's own.
_STANDARD_ATTENTION = re.compile(r"eager|sdpa|flex_attention|.*flash.*|fuseline")


def fake_mode() -> FakeTensorMode:
    """The mode under which one model is traced."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_parameters(model: PreTrainedModel, mode: FakeTensorMode, main: torch.dtype, dtype: torch.dtype) -> None:
    """Replace every parameter by a fake one on the CPU, those of type ``main`` in ``dtype``; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    wide = _kept_wide(model, dtype)
    for where, module in model.named_modules():
        for name, item in module._parameters.items():
            if item is None:
                continue
            full = f"{where}.{name}" if where else name
            if type(item.data) is not torch.Tensor:
                raise UnsupportedModelError(
                    f"{full} is a {type(item.data).__name__}, no plain tensor; dequantize the model first"
                )
            if id(item) not in made:
                kind = item.dtype if item.dtype != main else torch.float32 if wide and wide.search(full) else dtype
                with mode:
                    empty = torch.empty(item.shape, dtype=kind, device="cpu")
                    made[id(item)] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = made[id(item)]


def _kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The parameters that transformers keeps in fp32 when it loads the model in ``dtype``."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in sorted(kept))) if kept else None


def prepare(model: PreTrainedModel, attention: str, experts: str) -> None:
    """Have a model take its attention and experts by these names, and return logits alone.

    Raises:
        UnsupportedModelError: its attention does not go through transformers' ``AttentionInterface``.
    """
    model.eval()
    for option, value in (("output_attentions", False), ("output_hidden_states", False), ("return_dict", True)):
        setattr(model.config, option, value)
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from transformers' AttentionInterface: {error}"
        ) from error
    if attention == hooks.NAME and model.config._attn_implementation != attention:
        # Transformers reads the source of a class to see whether it may; that of a class from a notebook it cannot read.
        bases: list[Any] = [
            base for base in type(model).__mro__[1:] if base.__module__.startswith("transformers.models.")
        ]
        if not any(base._can_set_attn_implementation() for base in bases if issubclass(base, PreTrainedModel)):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface{_first_attention(model)}"
            )
        model.config._attn_implementation = attention
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)


def _first_attention(model: PreTrainedModel) -> str:
    for where, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            return f": {where} ({type(module).__name__}) computes its own"
    return ""


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the parameters.

    Raises:
        UnsupportedModelError: it cannot be copied.
    """
    try:
        return sharing_copy(model)
    except Exception as error:  # anything may hang on a module
        raise UnsupportedModelError(f"{type(model).__name__} holds something that cannot be copied: {error}") from error


def refuse_live(model: PreTrainedModel, empty: bool = False) -> None:
    """Refuse a given model that means something which its structure does not show.

    Raises:
        UnsupportedModelError: says what. With ``empty``, a parameter that is not on the meta device; else one that is.
    """
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "peft_config", None):
        raise UnsupportedModelError(f"{name} is quantized or carries adapters; merge or dequantize it first")
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if isinstance(attention, str) and not _STANDARD_ATTENTION.fullmatch(attention.rpartition("|")[2]):
        raise UnsupportedModelError(
            f"{name} runs with the attention {attention!r}, whose meaning is not known; set attn_implementation='eager' "
            "if that is what the model means"
        )
    for where, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(f"{where or name} carries forward hooks, which a graph cannot hold")
        for item, value in module.named_parameters(recurse=False):
            if value.is_meta and not empty:
                raise UnsupportedModelError(
                    f"{where}.{item} is on the meta device: load the weights first, or pass weights=<tensors by name>"
                )
            if empty and not value.is_meta:
                raise UnsupportedModelError(
                    f"{where}.{item} holds values, and weights gives others: build the model under torch.device('meta'), "
                    "or leave weights out"
                )


def names_of_each(model: PreTrainedModel) -> dict[str, list[str]]:
    """All names of a parameter by each of them: several where the model ties parameters, though they be apart now."""
    named = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    groups: dict[object, list[str]] = {}
    for name in named:
        groups.setdefault(id(named.get(tied.get(name, name), named[name])), []).append(name)
    return {name: group for group in groups.values() for name in group}
