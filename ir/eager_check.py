"""Check what was captured of an attention layer against the layer's own eager attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .attention import attention as reference
from .attention import visible
from .errors import UnsupportedModelError
from .hooks import AttentionCall


def check_against_eager(calls: Sequence[AttentionCall], masks_of: dict[int, tuple[str, int]]) -> None:
    """Compare each attention layer with the model's own eager attention on random values.

    A layer may scale, cap or bias its scores in ways that its call does not show; then the two differ.

    Raises:
        UnsupportedModelError: they differ, or the model has no eager attention to compare with.
    """
    generator = torch.Generator().manual_seed(0)
    for call in calls:
        if call.layer not in masks_of:
            continue  # its result is not used
        kind, window = masks_of[call.layer]
        length = 7
        q, k, v = (torch.randn(1, heads, length, width, generator=generator) for heads, width in call.shapes)
        eager = _eager_of(call.module)
        if eager is None:
            raise UnsupportedModelError(
                f"{call.where} has no eager_attention_forward to check the captured attention against"
            )
        twin, sinks = _with_own_parameters(call.module, generator)
        options = dict(call.options)
        if call.softcap:
            options["softcap"] = call.softcap
        if call.has_sinks:
            if sinks is None:
                raise UnsupportedModelError(f"{call.where}: attention sinks are not a parameter of the layer")
            options["s_aux"] = sinks
        places = torch.arange(length)
        seen = visible(places, places, kind, window)
        additive = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.no_grad():
            theirs = _run(eager, call, twin, q, k, v, additive, options)
            rows = [item.transpose(1, 2) for item in (q, k, v)]
            ours = reference(
                *rows, call.layer, call.scale, kind, window, call.softcap, sinks if call.has_sinks else None
            )
        error = float((theirs.float() - ours).norm() / ours.norm())
        if not error < 1e-4:
            raise UnsupportedModelError(
                f"{call.where} computes more than softmax(q k^T) v with a causal mask: "
                f"its eager attention differs from the captured one by {error:.1e}"
            )


def _run(
    eager: Callable[..., Any], call: AttentionCall, twin: Any, q: Any, k: Any, v: Any, mask: Any, options: Any
) -> Any:
    try:
        return eager(twin, q, k, v, mask, scaling=call.scale, dropout=0.0, **options)[0]
    except Exception as error:  # the model's own code
        raise UnsupportedModelError(
            f"{call.where}: its eager attention cannot be run by itself, so the captured attention cannot be checked: {error}"
        ) from error


def _eager_of(module: torch.nn.Module) -> Callable[..., Any] | None:
    for base in type(module).__mro__:
        found = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _with_own_parameters(
    module: torch.nn.Module, generator: torch.Generator
) -> tuple[torch.nn.Module, torch.Tensor | None]:
    """A shallow copy of an attention layer whose own small parameters (such as sinks) are real random tensors."""
    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        name: None if item is None else torch.nn.Parameter(torch.randn(item.shape, generator=generator))
        for name, item in module._parameters.items()
    }
    twin.training = False
    sinks = twin._parameters.get("sinks")
    return twin, None if sinks is None else sinks.detach()
