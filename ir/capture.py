"""Capture: trace a Hugging Face causal LM over one flat row of tokens and rewrite the trace as our graph.

The captured graph means: the logits ``[T, vocab]`` of one sequence, every token attending to those before it. All that
happens to a token outside attention may depend on that token alone; what mixes tokens elsewhere is refused.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from . import hooks
from .convert import convert
from .errors import UnsupportedModelError
from .graph import Graph
from .mixing import refuse_mixing
from .skeleton import Skeleton

MAX_STEP_TOKENS = 8192


class _FlatTokens(torch.nn.Module):
    """``(tokens [T], positions [T]) -> logits [T, vocab]``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            # All ones: no padding, and no search for packed sequences, whose place the paged cache takes.
            attention_mask=torch.ones_like(tokens)[None],
            use_cache=False,
        )
        return out.logits[0]  # type: ignore[no-any-return]


def capture(source: Skeleton, options: dict[str, int] | None = None) -> Graph:
    """The graph of a model: ``decoder(tokens i64[T], positions i64[T]) -> logits [T, vocab]``.

    ``options`` become part of the graph: choices that passes read (``kv_block``, the tokens in a block of the KV cache).

    Raises:
        UnsupportedModelError: the model cannot be traced, holds attention outside ``AttentionInterface``, or mixes
            tokens elsewhere; the message names the layer or node.
    """
    model = source.model
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}.forward takes no position_ids, so it cannot be run over concatenated sequences"
        )
    _refuse_config(model)
    with hooks.recording() as calls:
        exported = _export(_FlatTokens(model), source.mode, name)
    graph, masks_of = convert(exported, prefix="model.")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(calls))
    if len(masks_of) != layers or len(calls) < layers:
        raise UnsupportedModelError(
            f"{name} has {layers} layers but {len(masks_of)} attention operators were captured: its other layers "
            "do not go through transformers' AttentionInterface (state-space, convolution or alibi layers), which is not supported"
        )
    hooks.check_against_eager(calls, masks_of)
    refuse_mixing(graph)
    graph.options.update(options or {})
    return graph


def _refuse_config(model: Any) -> None:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; only decoder-only models compile")
    for where, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise UnsupportedModelError(
                    f"{where}: rope_type {kind!r} changes its frequencies with the length seen so far, so tokens "
                    "already in the KV cache would need other keys; set rope_parameters to 'default', 'linear', 'yarn' or 'llama3'"
                )


def _export(module: torch.nn.Module, mode: FakeTensorMode, name: str) -> torch.export.ExportedProgram:
    with mode:
        tokens = torch.zeros(7, dtype=torch.long)
        positions = torch.zeros(7, dtype=torch.long)
    length = torch.export.Dim("T", min=2, max=MAX_STEP_TOKENS)
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module, (tokens, positions), dynamic_shapes=({0: length}, {0: length}), strict=False
            )
            if _writes_in_place(exported):
                exported = exported.run_decompositions({})
            return exported
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch.export fails in many ways; all mean the same here
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UnsupportedModelError(
            f"{name} cannot be traced over a flat row of tokens: {type(cause).__name__}: {reason[:400]}{_frame(cause)}"
        ) from error
    finally:
        quiet.setLevel(level)


def _frame(error: BaseException) -> str:
    """Where in the model's code the trace broke."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "modeling_" in file or "masking_utils" in file:
            found = f" (at {file.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _writes_in_place(exported: torch.export.ExportedProgram) -> bool:
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                    return True
    return False
