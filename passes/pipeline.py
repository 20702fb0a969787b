"""The pipeline: the passes a model goes through, in order, each by the name it has in dumps and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import FuselineError, UnsupportedModelError
from ..ir.graph import Graph
from ..ir.verify import verify
from . import activations, norms, outer, rotary
from .batch_dim import drop_batch_dim
from .duplicates import merge_duplicates
from .grouping import group_kernels
from .ledger import PassReport, Refusal
from .merge import merge_gate_up, merge_qkv
from .paging import page_attention
from .rule import Rule
from .select_rows import select_rows
from .transposes import sink_transposes

GraphPass = Callable[[Graph], tuple[Graph, PassReport]]

# A declaration is a class to the eye and a `Rule` once its decorator has read it.
_DECLARED: tuple[Any, ...] = (
    outer.OuterFromMatmul,
    outer.OuterByRows,
    outer.ColumnFromRow,
    activations.LinearFromAddmm,
    norms.FuseWrittenLayerNorm,  # before the RMS norm that is a part of it
    norms.FuseRMSNorm,
    norms.FuseNormScale,
    norms.FuseTorchRMSNorm,
    norms.FuseLayerNorm,
    rotary.FuseRope,
    rotary.FuseInterleavedRope,
    rotary.FuseSplitRope,
    rotary.FusePartialRope,
    activations.FuseTanhGelu,
    activations.FuseSiluMul,
    activations.FuseGeluMul,
    activations.FuseTanhGeluMul,
    norms.FuseAddRMSNorm,
)
RULES: tuple[Rule, ...] = _DECLARED

PASSES: dict[str, GraphPass] = {
    "DropBatchDim": drop_batch_dim,
    "MergeDuplicates": merge_duplicates,
    "SinkTransposes": sink_transposes,
    **{rule.name: rule for rule in RULES},
    "MergeQKV": merge_qkv,
    "MergeGateUp": merge_gate_up,
    "PageAttention": page_attention,
    "SelectRows": select_rows,
    "GroupKernels": group_kernels,
}

# Hugging Face spellings become our operators.
CANONICAL: tuple[str, ...] = (
    "OuterFromMatmul",
    "DropBatchDim",
    "MergeDuplicates",
    "SinkTransposes",
    "MergeDuplicates",
    *(rule.name for rule in RULES[1:]),
    "MergeDuplicates",
)
# Our operators become kernels over a paged cache.
LOWERING: tuple[str, ...] = ("MergeQKV", "MergeGateUp", "PageAttention", "SelectRows", "GroupKernels")

PIPELINE: tuple[str, ...] = CANONICAL + LOWERING
# Without these a graph does not run over a paged cache.
_NEEDED = frozenset({"PageAttention", "SelectRows"})


class UnknownPassError(FuselineError, KeyError):
    """There is no pass of that name."""


@dataclass(frozen=True)
class Step:
    """One pass of a run: the graph after it and its account."""

    name: str
    graph: Graph
    report: PassReport


def steps(graph: Graph, names: Sequence[str] = PIPELINE, check: bool = False) -> Iterator[Step]:
    """Run passes one after another and show each result. ``check`` verifies the graph after each pass.

    Raises:
        UnknownPassError: a name is not in ``PASSES``.
    """
    for name in names:
        if name not in PASSES:
            raise UnknownPassError(f"no pass is named {name}; there are {', '.join(PASSES)}")
    for name in names:
        begin = time.perf_counter()
        graph, report = _guarded(name, graph, check)
        report.milliseconds = 1e3 * (time.perf_counter() - begin)
        if check:
            verify(graph)
        yield Step(name, graph, report)


def _guarded(name: str, graph: Graph, check: bool) -> tuple[Graph, PassReport]:
    """A pass on a graph. One that fails on a model it was not made for leaves the graph as it is and says why.

    Raises:
        UnsupportedModelError: the graph cannot be run without this pass. With ``check``, the pass's own error.
    """
    try:
        return PASSES[name](graph)
    except FuselineError:
        raise
    except Exception as error:
        if check:
            raise
        why = f"{type(error).__name__}: {error}"
        if name in _NEEDED:
            raise UnsupportedModelError(f"{name} cannot handle this model: {why}") from error
        return graph, PassReport(name, refused=[Refusal("graph", why)])


def run(graph: Graph, names: Sequence[str] = PIPELINE) -> Graph:
    """Run the named passes on a graph and return the new graph; the given one stays as it is."""
    for step in steps(graph, names):
        graph = step.graph
    return graph
