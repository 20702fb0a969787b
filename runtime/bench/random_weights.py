"""Random weights that are made when they are asked for: for shapes too large for one device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


class RandomWeights(Mapping[str, Tensor]):
    """Values for the parameters of a model on the meta device, by the names of ``named_parameters()``, tied ones included.

    They are spread as transformers' ``_init_weights`` does: matrices normal with the config's ``initializer_range``, norms
    ones, biases zeros. Each is drawn on ``device`` in the parameter's type, from a seed that is made of ``seed`` and its
    name: the same numbers for whoever asks on the same kind of device, in any order. Nothing is kept.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str, seed: int = 0) -> None:
        self._device, self._seed = torch.device(device), seed
        self._spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
        self._kinds = {name: item.detach().to("meta") for name, item in model.named_parameters(remove_duplicate=False)}
        first: dict[int, str] = {}
        self._drawn_as = {
            name: first.setdefault(id(item), name) for name, item in model.named_parameters(remove_duplicate=False)
        }
        self._modules = {name: type(item).__name__.lower() for name, item in model.named_modules()}

    def __getitem__(self, name: str) -> Tensor:
        """Raises ``KeyError`` if the model has no parameter of that name."""
        kind, own = self._kinds[name], self._drawn_as[name]
        made = torch.empty(kind.shape, dtype=kind.dtype, device=self._device)
        module, _, last = own.rpartition(".")
        if last.endswith("bias"):
            return made.zero_()
        if "norm" in self._modules[module]:
            return made.fill_(1)
        digest = hashlib.sha256(f"{self._seed} {own}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "big"))
        return made.normal_(0, self._spread, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
