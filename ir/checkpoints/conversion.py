"""How transformers puts a checkpoint's tensors together into the values of a model, and takes them apart: names and stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .layout import Layout


class Conversion:
    """What loading into a model does with names and tensors, by transformers' own rules.

    ``values`` are the model's, by name: its parameters and saved buffers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ``ImportError`` with a transformers whose rules lie elsewhere."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self.values = {name: item for name, item in model.state_dict().items() if isinstance(item, Tensor)}
        changes = get_model_conversion_mapping(model)
        self._renamings = [item for item in changes if isinstance(item, WeightRenaming)]
        self._converters = [item for item in changes if isinstance(item, WeightConverter)]
        self._by_pattern = {pattern: item for item in self._converters for pattern in item.source_patterns}

    def value_of(self, key: str) -> tuple[str, str] | None:
        """The value that a tensor of that name goes into, and the pattern that it fits there; nothing if there is none."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self.values)
        if name not in self.values and key in self.values:
            name, pattern = rename_source_key(key, [], [], prefix, self.values)
        return (name, pattern or "") if name in self.values else None

    def layouts(self, tensors: Mapping[str, Layout]) -> dict[str, Layout] | None:
        """How each value is made of tensors, by the value's name; nothing if loading does more than put tensors together."""
        from transformers.core_model_loading import dot_natural_key

        parts: dict[str, dict[str, list[Layout]]] = {}
        for key in sorted(tensors, key=dot_natural_key):
            place = self.value_of(key)
            if place is not None:
                parts.setdefault(place[0], {}).setdefault(place[1], []).append(tensors[key])
        found: dict[str, Layout] = {}
        for name, items in parts.items():
            used = {self._by_pattern.get(pattern) for pattern in items}
            made = self._converted(name, items, used.pop()) if len(used) == 1 else None
            if made is None:
                return None
            found[name] = made
        return found

    def _converted(self, name: str, parts: dict[str, list[Layout]], converter: Any) -> Layout | None:
        """What a converter makes of the tensors for a value, by the patterns that they fit; nothing if it computes with them."""
        if converter is None:
            (items,) = parts.values()
            return items[0] if len(items) == 1 else None
        values: Any = parts
        try:
            for operation in converter.operations:
                values = operation.convert(
                    values,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=name,
                    model=self._model,
                    config=self._model.config,
                )
        except (AttributeError, TypeError, ValueError):
            return None
        found = list(values.values())
        single = len(found) == 1 == len(converter.target_patterns)
        return found[0] if single and isinstance(found[0], Layout) else None


def in_files(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a model under the names, and cut into the tensors, that transformers writes them as.

    Dims are cut as those of the model's values, whatever the last of them holds.

    Raises:
        UnsupportedModelError: this version of transformers does it in a way that is not known.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise UnsupportedModelError(
            f"how this version of transformers writes a {type(model).__name__} is not known: {error}"
        ) from error
    return revert_weight_conversion(model, dict(values))  # type: ignore[no-any-return]
