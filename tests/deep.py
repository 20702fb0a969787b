"""Tiny models of many layers."""

from __future__ import annotations

from typing import Any

import families
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def make_deep(name: str, layers: int, **changes: Any) -> PreTrainedModel:
    """A model of ``families`` with that many layers; lists with a kind for each layer go on in the same pattern."""
    family = families.FAMILIES[name]
    kinds = family.changes.get("layer_types")
    if kinds is not None:
        changes["layer_types"] = [kinds[place % len(kinds)] for place in range(layers)]
    config = families.config(families.Family(family.kind, {**family.changes, "num_hidden_layers": layers, **changes}))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    families.randomize(model, 0)
    return model.eval()
