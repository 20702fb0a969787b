"""The pipeline: the passes a model goes through, in order, each by the name it has in dumps and reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import FuselineError, UnsupportedModelError
from ..ir.graph import Graph
from ..ir.placement import OPTION as TENSOR_PARALLEL
from ..ir.verify import verify
from . import activations, norms, outer, rotary
from .batch_dim import drop_batch_dim
from .cache_rounding import OPTION as KV_DTYPE
from .cache_rounding import quantize_cache
from .duplicates import merge_duplicates
from .grouping import group_kernels
from .ledger import Applies, Look, PassReport
from .localize import localize
from .logits_in_parts import logits_in_parts
from .merge import merge_gate_up, merge_qkv
from .paging import page_attention
from .quantize import OPTION as QUANTIZATION
from .quantize import quantize
from .read_rounded import read_rounded
from .registry import GraphPass, Registry
from .rule import Rule
from .scales import fold_norm_scales
from .select_rows import select_rows
from .shard import shard
from .switches import Switches
from .transposes import sink_transposes
from .uniform import drop_uniform_masks

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

_OWN: dict[str, GraphPass] = {
    "DropBatchDim": drop_batch_dim,
    "DropUniformMasks": drop_uniform_masks,
    "MergeDuplicates": merge_duplicates,
    "SinkTransposes": sink_transposes,
    **{rule.name: rule for rule in RULES},
    "MergeQKV": merge_qkv,
    "MergeGateUp": merge_gate_up,
    "Quantize": quantize,
    "ReadRounded": read_rounded,
    "FoldNormScales": fold_norm_scales,
    "Shard": shard,
    "LogitsInParts": logits_in_parts,
    "Localize": localize,
    "PageAttention": page_attention,
    "QuantizeCache": quantize_cache,
    "SelectRows": select_rows,
    "GroupKernels": group_kernels,
}

# Hugging Face spellings become our operators.
CANONICAL: tuple[str, ...] = (
    "OuterFromMatmul",
    "DropBatchDim",
    "DropUniformMasks",
    "MergeDuplicates",
    "SinkTransposes",
    "MergeDuplicates",
    *(rule.name for rule in RULES[1:]),
    "MergeDuplicates",
)
# Our operators become kernels over a paged cache.
LOWERING: tuple[str, ...] = (
    "MergeQKV",
    "MergeGateUp",
    "Quantize",
    "ReadRounded",
    "FoldNormScales",
    "Shard",
    "LogitsInParts",
    "Localize",
    "PageAttention",
    "QuantizeCache",
    "SelectRows",
    "GroupKernels",
)

PASSES = Registry(_OWN, CANONICAL + LOWERING)
# Without these a graph does not run over a paged cache.
NEEDED = frozenset({"PageAttention", "SelectRows"})
# Without these it runs, but not as asked for, or in more memory: they must not fail unseen.
_NOT_UNSEEN = NEEDED | {"ReadRounded"}
# The same, where an option of the graph asks for what they do.
_ASKED_FOR = {
    "Quantize": QUANTIZATION,
    "QuantizeCache": KV_DTYPE,
    "Shard": TENSOR_PARALLEL,
    "Localize": TENSOR_PARALLEL,
}


@dataclass(frozen=True)
class Step:
    """One pass of a run: the graph after it and its account."""

    name: str
    graph: Graph
    report: PassReport


def steps(
    graph: Graph, names: Sequence[str] | None = None, check: bool = False, skip: Switches | None = None
) -> Iterator[Step]:
    """Run passes one after another, by default the whole pipeline, and show each result.

    Args:
        check: verify the graph, and what each pass makes of it.
        skip: passes, and single applications of them, that are switched off.

    Raises:
        UnknownPassError: a name is not in ``PASSES``.
    """
    names = PASSES.pipeline if names is None else names
    for name in names:
        PASSES[name]
    if check:
        verify(graph)
    for number, name in enumerate(names, start=1):
        report = PassReport(name)
        if skip is not None:
            report.off = skip.applications(name)
        if skip is None or not skip.whole(number, name):
            graph = apply(name, graph, report, check)
        yield Step(name, graph, report)


def apply(name: str, graph: Graph, report: PassReport, check: bool = False) -> Graph:
    """The graph after one pass; the given one stays as it is, and may be what is returned where there is nothing to do.

    A pass that fails on a model it was not made for changes nothing, and the report says why.

    Raises:
        UnsupportedModelError: the graph cannot be run without this pass. With ``check``, the pass's own error.
        VerificationError: with ``check``, the pass left a malformed graph.
    """
    begin = time.perf_counter()
    try:
        if _is_idle(PASSES[name], graph, report):
            after = graph
        else:
            after = PASSES[name](graph.copy(), report)
            after.eliminate_dead()
    except FuselineError:
        raise
    except Exception as error:
        if check:
            raise
        why = f"{type(error).__name__}: {error}"
        if name in _NOT_UNSEEN or graph.options.get(_ASKED_FOR.get(name, "")):
            raise UnsupportedModelError(f"{name} cannot handle this model: {why}") from error
        report.refuse("graph", why)
        after = graph
    report.milliseconds = 1e3 * (time.perf_counter() - begin)
    if check and after is not graph:
        verify(after)
    return after


def _is_idle(item: GraphPass, graph: Graph, report: PassReport) -> bool:
    """Whether a pass that asks before its first change finds nothing to do; the report then says what it refused."""
    if not getattr(item, "asks_first", False):
        return False
    look = Look(report.name)
    try:
        item(graph, look)
    except Applies:
        return False
    report.refused, report.near = look.refused, look.near
    return True


def run(graph: Graph, names: Sequence[str] | None = None) -> Graph:
    """Run the named passes (by default the whole pipeline) on a graph and return the new graph; the given one stays as it is."""
    for step in steps(graph, names):
        graph = step.graph
    return graph
