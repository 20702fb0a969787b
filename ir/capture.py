"""Capture: trace a Hugging Face causal LM over one flat row of tokens and rewrite the trace as our graph.

The captured graph means: the logits ``[T, vocab]`` of one sequence, every token attending to those before it. All that
happens to a token outside attention may depend on that token alone; what mixes tokens elsewhere is refused.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .convert import convert
from .eager_check import check_against_eager
from .errors import UnsupportedModelError, VerificationError
from .export import export
from .fold import Fold, find_fold, shortened
from .graph import Graph
from .mixing import refuse_mixing
from .period import write_fold
from .rope import fix_frequencies
from .rounded_weights import alike, state_rounded
from .skeleton import Skeleton
from .verify import verify

MAX_STEP_TOKENS = 8192


class _FlatTokens(torch.nn.Module):
    """``(tokens [T], positions [T]) -> logits [T, vocab]``.

    A model that takes no ``position_ids`` counts its tokens instead, which ``convert`` reads as ``positions``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes = frozenset(inspect.signature(model.forward).parameters)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        arguments = {
            "position_ids": positions[None],
            # All ones: no padding, and no search for packed sequences, whose place the paged cache takes.
            "attention_mask": torch.ones_like(tokens)[None],
            "use_cache": False,
        }
        out = self.model(input_ids=tokens[None], **{name: arguments[name] for name in arguments if name in self.takes})
        return out.logits[0]  # type: ignore[no-any-return]


def capture(
    source: Skeleton, options: dict[str, Any] | None = None, max_seq_len: int | None = None, fold: bool = False
) -> Graph:
    """The graph of a model: ``decoder(tokens i64[T], positions i64[T]) -> logits [T, vocab]``.

    ``options`` become part of the graph: choices that passes read (``kv_block``, the tokens in a block of the KV cache).
    ``max_seq_len`` is the longest sequence that the graph will be used for: some rotary embeddings need to know.
    With ``fold``, a deep model of equal layers is traced with a few of them, and the graph states how many they stand for.

    Raises:
        UnsupportedModelError: the model cannot be traced, holds attention outside ``AttentionInterface``, or mixes
            tokens elsewhere; the message names the layer or node.
    """
    model = source.model
    name = type(model).__name__
    if getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models compile")
    fix_frequencies(model, max_seq_len)
    flat = _FlatTokens(model)
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    folded = _fold(flat, source) if fold and alike(source.schemes, source.ordered, names) else None
    try:
        with shortened(model, folded) if folded else nullcontext():
            trace = export(flat, source.mode, name, MAX_STEP_TOKENS)
    except UnsupportedModelError:
        if folded is None:
            raise
        # The model's code may count on all of its layers; if not, the message speaks of the whole model.
        folded, trace = None, export(flat, source.mode, name, MAX_STEP_TOKENS)
    graph, masks_of = convert(trace.program, prefix="model.")
    refuse_mixing(graph)
    trace.check_conditions(name)
    if not masks_of:
        raise UnsupportedModelError(f"{name} has no attention through transformers' AttentionInterface")
    check_against_eager(trace.calls, masks_of)
    state_rounded(graph, source.schemes, source.ordered)
    try:
        verify(graph)
    except VerificationError as error:  # an operator whose result has another type than the trace says
        raise UnsupportedModelError(f"{name} cannot be stated as a graph: {error}") from error
    graph.options.update(options or {})
    if folded:
        write_fold(graph, folded)
    return graph


def _fold(flat: _FlatTokens, source: Skeleton) -> Fold | None:
    """How the model can be folded; a model that fails at this is traced whole, where a failure has its message."""
    with source.mode:
        tokens = torch.zeros(7, dtype=torch.long)
    try:
        found = find_fold(source.model, lambda: flat(tokens, tokens), source.mode)
        with shortened(source.model, found) if found else nullcontext():
            return found
    except Exception:  # the model's own code
        return None
