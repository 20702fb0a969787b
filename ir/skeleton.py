"""A model's structure without its weights, ready to be traced; and the place its weights come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from . import hooks
from .checkpoints.held import Checkpoint
from .checkpoints.plain import plain_weights
from .checkpoints.read import plain_model, read_checkpoint, summary
from .errors import UnsupportedModelError
from .fold import Fold
from .prepare import fake_mode, fake_parameters, names_of_each, prepare, refuse_live, sharing
from .score import score_few, score_model
from .weights import GivenWeights, LazyWeights

Weights = Mapping[str, torch.Tensor]
Prompts = Sequence[Sequence[int]]


@dataclass
class Skeleton:
    """``model`` has fake parameters and real buffers; ``load`` brings the real values by checkpoint name.

    ``score(prompts, fold)`` gives for each prompt the logits ``[len(prompt), vocab]`` of the model itself with eager
    attention, the yardstick of what was compiled, with ``fold`` of the layers alone that are traced then; it may be
    called after ``load`` and until ``forget``. It is nothing where there is no model but a structure.

    ``lazy()`` gives the values that ``load`` brings without reading them, if each is one of a file's tensors.
    ``score_few(prompts, fold, most)`` reads for ``score`` those of the layers that are traced alone, and gives nothing if
    they take more than ``most`` bytes; it is there if ``lazy`` gave something.

    ``schemes`` are those of the matrices that the checkpoint holds rounded, by name; their values are rows of bytes.
    The inputs of the ``ordered`` ones stand in an order of their own, which is a value, too (see ``state_rounded``).
    ``score`` reads the numbers that they stand for. ``held`` says in words what the checkpoint holds.
    """

    model: PreTrainedModel
    mode: FakeTensorMode
    dtype: torch.dtype
    source_dtype: torch.dtype  # of the model that ``score`` runs
    load: Callable[[], Weights]
    score: Callable[[Prompts, Fold | None], list[torch.Tensor]] | None
    forget: Callable[[], None]
    lazy: Callable[[], LazyWeights | None] = lambda: None
    score_few: Callable[[Prompts, Fold | None, int], list[torch.Tensor] | None] | None = None
    schemes: Mapping[str, str] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    held: str = ""


def skeleton(
    source: PreTrainedModel | str | Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    weights: Weights | None = None,
) -> Skeleton:
    """The structure of a model in ``dtype``. The given model, if it is one, is left unchanged.

    Args:
        source: a live model, a local directory, a ``.gguf`` file, or a hub id.
        weights: the values of a live model whose parameters are on the meta device, by name.

    Raises:
        UnsupportedModelError: the source is no causal language model, or cannot be read.
        WeightsError: ``weights`` lacks a parameter.
    """
    hooks.install()
    if weights is not None:
        if not isinstance(source, PreTrainedModel):
            raise UnsupportedModelError(
                "weights by name are for a transformers model that was built under torch.device('meta'), not for a "
                f"{type(source).__name__}"
            )
        return _from_meta(source, dtype, weights)
    if isinstance(source, PreTrainedModel):
        return _from_live(source, dtype)
    if isinstance(source, (str, Path)):
        return _from_path(source, dtype, trust_remote_code)
    raise UnsupportedModelError(
        f"cannot compile a {type(source).__name__}: give a transformers model, a local path or a hub id"
    )


def _from_live(model: PreTrainedModel, dtype: torch.dtype) -> Skeleton:
    refuse_live(model)
    mode, twin = fake_mode(), sharing(model)
    for module in twin.modules():
        for name, item in module._buffers.items():
            if item is not None:
                module._buffers[name] = item.cpu()
    fake_parameters(twin, mode, model.dtype, dtype)
    prepare(twin, hooks.NAME, hooks.NAME)
    kept: list[PreTrainedModel] = []

    def load() -> dict[str, torch.Tensor]:
        # Buffers as they were traced: a rotary embedding may have had those of a longer sequence.
        named = [*model.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]
        return {name: item.detach() for name, item in named}

    def score(prompts: Prompts, fold: Fold | None = None) -> list[torch.Tensor]:
        if not kept:
            kept.append(sharing(model))
            prepare(kept[0], "eager", "eager")
        return score_model(kept[0], prompts, fold)

    return Skeleton(twin, mode, dtype, model.dtype, load, score, kept.clear)


def _from_meta(model: PreTrainedModel, dtype: torch.dtype, weights: Weights) -> Skeleton:
    refuse_live(model, empty=True)
    try:
        twin = _built(lambda: type(model)._from_config(copy.deepcopy(model.config), dtype=dtype))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be built from its config: {error}") from error
    twin.tie_weights()
    shapes = [
        {name: item.shape for name, item in each.named_parameters(remove_duplicate=False)} for each in (model, twin)
    ]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise UnsupportedModelError(f"{type(model).__name__} is not what its config says: they differ in {odd}")
    # Buffers that have values are the caller's; the others are those that the config gives.
    given = {name: item for name, item in model.named_buffers(remove_duplicate=False) if not item.is_meta}
    for where, module in twin.named_modules():
        for name in module._buffers:
            found = given.get(f"{where}.{name}" if where else name)
            module._buffers[name] = module._buffers[name] if found is None else found.cpu()
    twin.generation_config = copy.deepcopy(model.generation_config)
    mode = fake_mode()
    fake_parameters(twin, mode, dtype, dtype)
    prepare(twin, hooks.NAME, hooks.NAME)
    kinds = dict(twin.named_parameters(remove_duplicate=False))
    names = names_of_each(twin)

    def load() -> GivenWeights:
        return GivenWeights(weights, kinds, names, dict(twin.named_buffers(remove_duplicate=False)))

    load()  # what is missing is said before anything is traced
    return Skeleton(twin, mode, dtype, dtype, load, None, lambda: None, load)


def _built(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model with all parameters on the meta device, and buffers that have their values."""
    with init_empty_weights(include_buffers=False):
        return build()


def _from_path(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    where: str | Path = path
    if str(path).endswith(".gguf"):
        where, options["gguf_file"] = Path(path).parent, Path(path).name

    def of_config(config: PretrainedConfig) -> PreTrainedModel:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return made

    try:
        config = AutoConfig.from_pretrained(where, **options)
        plain = copy.deepcopy(config)
        model = _built(lambda: of_config(config))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{path}: not a causal language model that transformers can read: {reason}"
        ) from error
    rounded = _checkpoint(path, config, model)
    mode = fake_mode()
    fake_parameters(model, mode, dtype, dtype)
    prepare(model, hooks.NAME, hooks.NAME)
    kept: list[PreTrainedModel] = []

    def full() -> PreTrainedModel:
        if not kept:
            kept.append(
                plain_model(rounded, type(model), config, dtype)
                if rounded
                else AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
            )
            prepare(kept[0], "eager", "eager")
        return kept[0]

    def load() -> dict[str, torch.Tensor]:
        named = [*full().named_parameters(remove_duplicate=False), *full().named_buffers(remove_duplicate=False)]
        traced = model.named_buffers(remove_duplicate=False)
        return {
            **dict(traced),
            **{name: item.detach() for name, item in named},
            **(rounded.values() if rounded else {}),
        }

    def score(prompts: Prompts, fold: Fold | None = None) -> list[torch.Tensor]:
        return score_model(full(), prompts, fold)

    found: list[LazyWeights] = []

    def lazy() -> LazyWeights | None:
        weights = plain_weights(path, model, options)
        found.extend([weights] if weights else [])
        return weights

    def few(prompts: Prompts, fold: Fold | None, most: int) -> list[torch.Tensor] | None:
        own = _built(lambda: of_config(plain))
        prepare(own, "eager", "eager")
        return score_few(own, found[0], prompts, fold, most)

    def forget() -> None:
        kept.clear()
        found.clear()

    bones = Skeleton(model, mode, dtype, dtype, load, score, forget, lazy, few)
    if rounded:
        bones.lazy = lambda: None
        bones.schemes, bones.ordered = rounded.schemes, frozenset(rounded.orders)
        bones.held = summary(rounded)
    return bones


def _checkpoint(path: str | Path, config: PretrainedConfig, model: PreTrainedModel) -> Checkpoint | None:
    """What a checkpoint holds if its matrices are rounded; its config then says no more that they are."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return None
    del config.quantization_config
    return read_checkpoint(path, how if isinstance(how, dict) else how.to_dict(), model)
