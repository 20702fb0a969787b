"""A model's structure without its weights, ready to be traced; and the place its weights come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import hooks
from .errors import UnsupportedModelError

Weights = Mapping[str, torch.Tensor]


@dataclass
class Skeleton:
    """``model`` has fake parameters and real buffers; ``load`` brings the real values by checkpoint name."""

    model: PreTrainedModel
    mode: FakeTensorMode
    dtype: torch.dtype
    load: Callable[[], dict[str, torch.Tensor]]


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


def _fake_parameters(model: torch.nn.Module, mode: FakeTensorMode, dtypes: Callable[[torch.dtype], torch.dtype]) -> None:
    """Replace every parameter by a fake one on the CPU; parameters that are tied stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, item in module._parameters.items():
            if item is None:
                continue
            if id(item) not in made:
                with mode:
                    empty = torch.empty(item.shape, dtype=dtypes(item.dtype), device="cpu")
                    made[id(item)] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = made[id(item)]


def _prepare(model: PreTrainedModel) -> None:
    model.eval()
    model.requires_grad_(False)
    try:
        model.set_attn_implementation(hooks.NAME)
    except (ValueError, ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from transformers' AttentionInterface: {error}"
        ) from error
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(hooks.NAME)


def _from_live(model: PreTrainedModel, dtype: torch.dtype) -> Skeleton:
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "peft_config", None):
        raise UnsupportedModelError(f"{type(model).__name__} is quantized or carries adapters; merge or dequantize it first")
    mode = _fake_mode()
    main = model.dtype
    # Parameters are shared with the copy while it is made, so no weight is copied.
    memo: dict[int, Any] = {id(item): item for item in model.parameters()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hook_table in (module._forward_hooks, module._forward_pre_hooks):
            if hook_table:
                raise UnsupportedModelError(f"{type(module).__name__} carries forward hooks, which a graph cannot hold")
        for name, item in module._buffers.items():
            if item is not None:
                module._buffers[name] = item.cpu()
    _fake_parameters(twin, mode, lambda old: dtype if old == main else old)
    _prepare(twin)

    def load() -> dict[str, torch.Tensor]:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name: item.detach() for name, item in named}

    return Skeleton(twin, mode, dtype, load)


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
        raise UnsupportedModelError(f"{path}: not a causal language model that transformers can read: {reason}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{path}: quantized checkpoints are not supported; give an unquantized one")
    mode = _fake_mode()
    _fake_parameters(model, mode, lambda old: old)
    buffers = {name: item for name, item in model.named_buffers(remove_duplicate=False)}
    _prepare(model)

    def load() -> dict[str, torch.Tensor]:
        full = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
        named = [*full.named_parameters(remove_duplicate=False), *full.named_buffers(remove_duplicate=False)]
        return {**buffers, **{name: item.detach() for name, item in named}}

    return Skeleton(model, mode, dtype, load)
