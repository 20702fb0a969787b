"""A model's structure without its weights, ready to be traced; and the place its weights come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from . import hooks
from .checkpoints.held import Checkpoint
from .checkpoints.read import plain_model, read_checkpoint, summary
from .errors import UnsupportedModelError
from .fold import Fold, shortened
from .sharing import sharing_copy

# Attention that computes what eager attention computes; another name is a function of the user's own.
_STANDARD_ATTENTION = re.compile(r"eager|sdpa|flex_attention|.*flash.*|fuseline")

Weights = Mapping[str, torch.Tensor]


@dataclass
class Skeleton:
    """``model`` has fake parameters and real buffers; ``load`` brings the real values by checkpoint name.

    ``score(prompts, fold)`` gives for each prompt the logits ``[len(prompt), vocab]`` of the model itself with eager
    attention, the yardstick of what was compiled, with ``fold`` of the layers alone that are traced then; it may be
    called after ``load`` and until ``forget``.

    ``schemes`` are those of the matrices that the checkpoint holds rounded, by name; their values are rows of bytes.
    The inputs of the ``ordered`` ones stand in an order of their own, which is a value, too (see ``state_rounded``).
    ``score`` reads the numbers that they stand for. ``held`` says in words what the checkpoint holds.
    """

    model: PreTrainedModel
    mode: FakeTensorMode
    dtype: torch.dtype
    source_dtype: torch.dtype  # of the model that ``score`` runs
    load: Callable[[], dict[str, torch.Tensor]]
    score: Callable[[Sequence[Sequence[int]], Fold | None], list[torch.Tensor]]
    forget: Callable[[], None]
    schemes: Mapping[str, str] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    held: str = ""


def skeleton(source: PreTrainedModel | str | Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """The structure of a model in ``dtype``. The given model, if it is one, is left unchanged.

    Args:
        source: a live model, a local directory, a ``.gguf`` file, or a hub id.

    Raises:
        UnsupportedModelError: the source is no causal language model, or cannot be read.
    """
    hooks.install()
    if isinstance(source, PreTrainedModel):
        return _from_live(source, dtype)
    if isinstance(source, (str, Path)):
        return _from_path(source, dtype, trust_remote_code)
    raise UnsupportedModelError(
        f"cannot compile a {type(source).__name__}: give a transformers model, a local path or a hub id"
    )


def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _fake_parameters(model: PreTrainedModel, mode: FakeTensorMode, main: torch.dtype, dtype: torch.dtype) -> None:
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


def _prepare(model: PreTrainedModel, attention: str, experts: str) -> None:
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


def _score(model: PreTrainedModel, prompts: Sequence[Sequence[int]], fold: Fold | None) -> list[torch.Tensor]:
    found = []
    with torch.inference_mode(), shortened(model, fold) if fold else nullcontext():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=model.device)
            try:
                found.append(model(input_ids=tokens).logits[0].float().cpu())
            except Exception as error:  # the model's own code
                raise UnsupportedModelError(
                    f"{type(model).__name__} itself fails on a prompt of {len(prompt)} tokens: {error}"
                ) from error
    return found


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    try:
        return sharing_copy(model)
    except Exception as error:  # anything may hang on a module
        raise UnsupportedModelError(f"{type(model).__name__} holds something that cannot be copied: {error}") from error


def _refuse_live(model: PreTrainedModel) -> None:
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
            if value.is_meta:
                raise UnsupportedModelError(f"{where}.{item} is on the meta device: load the weights first")


def _from_live(model: PreTrainedModel, dtype: torch.dtype) -> Skeleton:
    _refuse_live(model)
    mode, twin = _fake_mode(), _sharing(model)
    for module in twin.modules():
        for name, item in module._buffers.items():
            if item is not None:
                module._buffers[name] = item.cpu()
    _fake_parameters(twin, mode, model.dtype, dtype)
    _prepare(twin, hooks.NAME, hooks.NAME)
    kept: list[PreTrainedModel] = []

    def load() -> dict[str, torch.Tensor]:
        # Buffers as they were traced: a rotary embedding may have had those of a longer sequence.
        named = [*model.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]
        return {name: item.detach() for name, item in named}

    def score(prompts: Sequence[Sequence[int]], fold: Fold | None = None) -> list[torch.Tensor]:
        if not kept:
            kept.append(_sharing(model))
            _prepare(kept[0], "eager", "eager")
        return _score(kept[0], prompts, fold)

    return Skeleton(twin, mode, dtype, model.dtype, load, score, kept.clear)


def _from_path(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    where: str | Path = path
    if str(path).endswith(".gguf"):
        where, options["gguf_file"] = Path(path).parent, Path(path).name
    try:
        config = AutoConfig.from_pretrained(where, **options)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{path}: not a causal language model that transformers can read: {reason}"
        ) from error
    rounded = _checkpoint(path, config, model)
    mode = _fake_mode()
    _fake_parameters(model, mode, dtype, dtype)
    _prepare(model, hooks.NAME, hooks.NAME)
    kept: list[PreTrainedModel] = []

    def full() -> PreTrainedModel:
        if not kept:
            kept.append(
                plain_model(rounded, type(model), config, dtype)
                if rounded
                else AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
            )
            _prepare(kept[0], "eager", "eager")
        return kept[0]

    def load() -> dict[str, torch.Tensor]:
        named = [*full().named_parameters(remove_duplicate=False), *full().named_buffers(remove_duplicate=False)]
        traced = model.named_buffers(remove_duplicate=False)
        return {
            **dict(traced),
            **{name: item.detach() for name, item in named},
            **(rounded.values() if rounded else {}),
        }

    def score(prompts: Sequence[Sequence[int]], fold: Fold | None = None) -> list[torch.Tensor]:
        return _score(full(), prompts, fold)

    bones = Skeleton(model, mode, dtype, dtype, load, score, kept.clear)
    if rounded:
        bones.schemes = {name: item.scheme for name, item in rounded.matrices.items()}
        bones.ordered = frozenset(name for name, item in rounded.matrices.items() if item.order is not None)
        bones.held = summary(rounded)
    return bones


def _checkpoint(path: str | Path, config: PretrainedConfig, model: PreTrainedModel) -> Checkpoint | None:
    """What a checkpoint holds if its matrices are rounded; its config then says no more that they are."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return None
    del config.quantization_config
    shapes = {name: tuple(item.shape) for name, item in model.named_parameters(remove_duplicate=False)}
    return read_checkpoint(path, how if isinstance(how, dict) else how.to_dict(), shapes)
