"""Weights that are read when they are asked for, and of which nothing is kept; of what ranks divide, a part alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .dist import along, is_padded, spans
from .errors import WeightsError


class LazyWeights(Mapping[str, Tensor]):
    """Values by the names of parameters and buffers. Each access reads anew: whoever asks keeps what he needs.

    ``kinds`` are tensors without memory that have the shapes and types of the values; ``held`` are values that are there
    already, such as buffers that no checkpoint holds.
    """

    reads_parts = False
    """Whether of a part nothing else is read."""

    def __init__(self, kinds: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        self._kinds = {name: torch.empty(item.shape, dtype=item.dtype, device="meta") for name, item in kinds.items()}
        self._held = dict(held)

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name] if name not in self._kinds else self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._kinds, **self._held})

    def __len__(self) -> int:
        return len({**self._kinds, **self._held})

    def __contains__(self, name: object) -> bool:
        return name in self._kinds or name in self._held

    @property
    def nbytes(self) -> int:
        """Bytes of all values that would be read, of tied ones for each name."""
        return sum(item.nbytes for item in self._kinds.values())

    def like(self, name: str) -> Tensor | None:
        """A value that is there already, or a tensor on the meta device of the shape and type of one to be read."""
        return self._kinds.get(name, self._held.get(name))

    def part(self, name: str, dim: int, sections: Sequence[int], ranks: int, rank: int) -> Tensor:
        """What ``dist.shard`` gives of a value, in memory of its own.

        Raises:
            KeyError: there is no value of that name. ValueError: its dim is not made of the sections.
        """
        return cut(self[name], dim, sections, ranks, rank)

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """The value of one of ``kinds``."""


class GivenWeights(LazyWeights):
    """A caller's mapping from names to tensors of any device, for a model without weights.

    ``names`` are all names of a parameter by each of them: tied ones may be given under any. The caller's ``given`` is
    never asked for a name that it does not list.
    """

    def __init__(
        self,
        given: Mapping[str, Tensor],
        kinds: Mapping[str, Tensor],
        names: Mapping[str, Sequence[str]],
        buffers: Mapping[str, Tensor],
    ) -> None:
        known = set(given)
        self._given = given
        self._listed = {name: next((item for item in names[name] if item in known), "") for name in kinds}
        absent = [name for name, listed in self._listed.items() if not listed]
        if absent:
            raise WeightsError(
                f"weights: there is no {absent[0]!r}, and {len(absent)} of the model's {len(kinds)} parameters are missing; "
                "names are those of named_parameters()"
            )
        given_too = {name: item for name, item in buffers.items() if name in known}
        self._listed.update((name, name) for name in given_too)
        super().__init__({**kinds, **given_too}, {name: item for name, item in buffers.items() if name not in known})

    def like(self, name: str) -> Tensor | None:
        # What a plain dict holds is there already, and may be shared.
        return self._read(name) if type(self._given) is dict and name in self._listed else super().like(name)

    def _read(self, name: str) -> Tensor:
        found, kind = self._given[self._listed[name]], self._kinds[name]
        if not isinstance(found, Tensor) or found.is_meta:
            raise WeightsError(
                f"weights: {name!r} is {'on the meta device' if isinstance(found, Tensor) else 'no tensor'}"
            )
        if found.shape != kind.shape or found.is_floating_point() != kind.is_floating_point():
            raise WeightsError(
                f"weights: {name!r} is {found.dtype} of shape {tuple(found.shape)}, the model's is {kind.dtype} of shape "
                f"{tuple(kind.shape)}"
            )
        return found.detach()


def cut(whole: Tensor, dim: int, sections: Sequence[int], ranks: int, rank: int) -> Tensor:
    """A rank's part of each section next to each other, in memory of its own."""
    if whole.shape[dim] != sum(sections) and not is_padded(whole.shape[dim], sections):
        raise ValueError(f"dim {dim} of {tuple(whole.shape)} is not made of the sections {list(sections)}")
    pieces = [along(whole, dim, start, size) for start, size in spans(sections, ranks, rank)]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)


def known_of(weights: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A weight, or something with its shape, type and device if it would have to be read; nothing if there is none."""
    return weights.like(name) if isinstance(weights, LazyWeights) else weights.get(name)
