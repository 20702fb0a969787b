"""How Hugging Face models hand their attention, masks and experts to the graph.

Transformers lets a caller register its own attention, mask and experts functions. The functions here are registered as
``"fuseline"``; while a model is traced they record one opaque operator for each attention layer and each expert
projection, with everything that shapes the result as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as masks

from .errors import UnsupportedModelError

NAME = "fuseline"

# Arguments that say how to compute or what to return, not what to compute.
_IGNORED = frozenset(
    (
        "dropout sliding_window is_causal position_ids cache_position use_cache output_attentions "
        "output_hidden_states return_dict logits_to_keep labels num_items_in_batch output_router_logits "
        "training deterministic past_key_values past_key_value position_embeddings token_type_ids "
        "num_logits_to_keep max_seqlen layer_idx"
    ).split()
)


@torch.library.custom_op("fuseline::attention", mutates_args=())
def traced_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, layer: int, scale: float, softcap: float
) -> Tensor:
    raise RuntimeError("fuseline::attention exists only inside a captured graph")


@traced_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, layer: int, scale: float, softcap: float
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("fuseline::mask", mutates_args=())
def traced_mask(like: Tensor, kind: str, window: int) -> Tensor:
    raise RuntimeError("fuseline::mask exists only inside a captured graph")


@traced_mask.register_fake
def _(like: Tensor, kind: str, window: int) -> Tensor:
    length = like.shape[-1]
    return like.new_empty((1, 1, length, length), dtype=torch.bool)


@torch.library.custom_op("fuseline::grouped_linear", mutates_args=())
def traced_grouped_linear(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    raise RuntimeError("fuseline::grouped_linear exists only inside a captured graph")


@traced_grouped_linear.register_fake
def _(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((*ids.shape, weight.shape[-1] if transposed else weight.shape[-2]))


@dataclass
class AttentionCall:
    """What one attention layer asked for, kept to compare it with the layer's own eager attention."""

    module: torch.nn.Module
    where: str  # for messages: the layer and the class
    shapes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (heads, head_dim) of q, k and v
    layer: int
    scale: float
    softcap: float
    options: dict[str, Any]
    has_sinks: bool


_calls: ContextVar[list[AttentionCall] | None] = ContextVar("fuseline_attention_calls", default=None)


@contextmanager
def recording() -> Iterator[list[AttentionCall]]:
    """Collect the attention calls made while the context is open."""
    token = _calls.set([])
    try:
        found = _calls.get()
        yield found if found is not None else []
    finally:
        _calls.reset(token)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function given to transformers. Shapes as there: ``[1, heads, T, head_dim]``."""
    calls = _calls.get()
    if calls is None:
        raise UnsupportedModelError("the attention named 'fuseline' works only while fuseline captures a model")
    index = getattr(module, "layer_idx", None)
    where = type(module).__name__ if index is None else f"layer {index}: {type(module).__name__}"
    unknown = [
        name for name, item in options.items() if name not in _IGNORED and item is not None and item is not False
    ]
    if unknown:
        raise UnsupportedModelError(f"{where}: attention takes {', '.join(unknown)}, which Fuseline does not know")
    if attention_mask is None:
        raise UnsupportedModelError(
            f"{where}: attention without a mask looks at later tokens; only causal models compile"
        )
    if getattr(module, "is_causal", True) is False and options.get("is_causal") is False:
        raise UnsupportedModelError(f"{where}: attention is not causal")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Calls are counted: a layer that attends twice, or runs twice, needs a cache for each.
    layer = len(calls)
    shapes = tuple((int(item.shape[1]), int(item.shape[3])) for item in (query, key, value))
    kept = {name: item for name, item in options.items() if name == "sliding_window"}
    calls.append(
        AttentionCall(module, where, shapes, layer, scale, float(softcap or 0.0), kept, s_aux is not None)  # type: ignore[arg-type]
    )
    q, k, v = (item.transpose(1, 2) for item in (query, key, value))
    out = torch.ops.fuseline.attention(q, k, v, attention_mask, s_aux, layer, scale, float(softcap or 0.0))
    return out, None


def mask(
    attention_mask: Tensor | None = None, mask_function: Callable[..., Any] | None = None, **_: Any
) -> Tensor | None:
    """The mask function given to transformers: a value that carries the mask's kind and window to its layers."""
    if attention_mask is None:  # of an absent encoder, say; a layer that attends without a mask is refused
        return None
    kind, window = mask_kind(mask_function)
    return torch.ops.fuseline.mask(attention_mask, kind, window)  # type: ignore[no-any-return]


KNOWN_MASKS = frozenset({"causal", "sliding", "chunked"})


def mask_kind(function: Callable[..., Any] | None) -> tuple[str, int]:
    """Which mask a mask function of transformers builds: ``(kind, window)``.

    The kind is one of ``KNOWN_MASKS``, or names what the function is made of (a bidirectional prefix, image blocks, ...).
    """
    leaves = sorted((_leaf(item) for item in _conjuncts(function)), reverse=True)
    match leaves:
        case [("causal", 0)]:
            return "causal", 0
        case [(("sliding" | "chunked") as kind, window), ("causal", 0)]:
            return kind, window
    return " and ".join(name for name, _ in leaves), 0


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or ())}


def _conjuncts(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any] | None]:
    if function is not None and function.__qualname__.startswith("and_masks."):
        for item in _cells(function)["mask_functions"]:
            yield from _conjuncts(item)
    else:
        yield function


def _leaf(function: Callable[..., Any] | None) -> tuple[str, int]:
    if function is masks.causal_mask_function:
        return "causal", 0
    name = getattr(function, "__qualname__", "unknown").partition(".")[0]
    if function is not None and getattr(function, "__module__", "") == masks.__name__:
        if name == "sliding_window_overlay":
            return "sliding", int(_cells(function)["sliding_window"])
        if name == "chunked_overlay":
            return "chunked", int(_cells(function)["chunk_size"])
    return name, 0


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function given to transformers: every token goes through the experts it chose, weighted.

    ``hidden_states [T, K]``, ``top_k_index`` and ``top_k_weights [T, J]``; result ``[T, K]``.
    """
    biased, turned = bool(module.has_bias), bool(module.is_transposed)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = torch.ops.fuseline.grouped_linear(
        hidden_states, top_k_index, getattr(module, first), getattr(module, f"{first}_bias") if biased else None, turned
    )
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    hidden = torch.ops.fuseline.grouped_linear(
        hidden, top_k_index, module.down_proj, module.down_proj_bias if biased else None, turned
    )
    if getattr(module, "has_post_expert_norm", False):
        hidden = module.post_expert_norm(hidden)
    weighted = hidden * top_k_weights.unsqueeze(-1)
    total: Tensor = weighted.sum(1)
    return total.to(hidden_states.dtype)


def install() -> None:
    """Make the functions above known to transformers (idempotent)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return
    ExpertsInterface.register(NAME, experts)
