"""Rotary embeddings whose frequencies depend on the length seen: fixed where the longest sequence allows it, else refused."""

from __future__ import annotations

from typing import Any

import torch

from .errors import UnsupportedModelError

_BY_LENGTH = ("dynamic", "longrope")


def fix_frequencies(model: torch.nn.Module, max_seq_len: int | None) -> None:
    """Make every rotary embedding of ``model`` independent of the length, if no sequence is longer than ``max_seq_len``.

    ``dynamic`` and ``longrope`` embeddings keep the frequencies of short sequences up to a limit that the model states.
    Beyond it the keys already in the KV cache would be wrong whenever a sequence grows past the limit.

    Raises:
        UnsupportedModelError: ``max_seq_len`` is above that limit, or unknown; names the module and the limit.
    """
    for where, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            fixed = {
                layers: _fixed(module, where, kind, f"{layers}_", layers, max_seq_len) for layers, kind in kinds.items()
            }
            module.rope_type = fixed
        elif isinstance(kinds, str):
            module.rope_type = _fixed(module, where, kinds, "", None, max_seq_len)


def _fixed(module: Any, where: str, kind: str, prefix: str, layers: str | None, max_seq_len: int | None) -> str:
    """The rope type to trace with. A live model may hold the frequencies of a long sequence: put back those of short ones."""
    if not any(word in kind for word in _BY_LENGTH):
        return kind
    limit = _limit(module, kind, layers)
    original = getattr(module, f"{prefix}original_inv_freq", None)
    if limit is None or original is None or max_seq_len is None or max_seq_len > limit:
        advice = (
            f"compile with max_seq_len={limit} or less"
            if limit and original is not None
            else "choose another rope_type"
        )
        raise UnsupportedModelError(
            f"{where}: rope_type {kind!r} changes its frequencies with the length of the sequence, so keys that are already "
            f"in the KV cache would have to change; {advice}"
        )
    getattr(module, f"{prefix}inv_freq").data = original.clone()
    return "default"


def _limit(module: Any, kind: str, layers: str | None) -> int | None:
    if "longrope" not in kind:
        found = getattr(module, "original_max_seq_len", None)
    else:
        parameters = getattr(module.config, "rope_parameters", None) or {}
        parameters = parameters.get(layers, parameters) if layers else parameters
        found = parameters.get("original_max_position_embeddings")
    return found if isinstance(found, int) else None
