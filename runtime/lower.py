"""From a model to kernels: capture, passes and code generation. No weight is read for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import passes
from ..codegen.kernels import Kernel, emit_kernels
from ..codegen.verification import verify_kernels
from ..ir.capture import capture
from ..ir.errors import VerificationError
from ..ir.graph import Graph
from ..ir.loop import Loop, loop_of
from ..ir.period import NotPeriodic, fold_of
from ..ir.skeleton import Skeleton
from ..ir.unfold import Unfolded, unfold
from ..ir.verify import verify as verify_graph
from .dumps import Dump
from .expect import check_expectations
from .options import OptionError, Options
from .progress import Progress
from .report import Report


@dataclass(frozen=True)
class Wishes:
    """What a caller of ``compile`` wants done on the way: see there."""

    skip: Sequence[str | int] = ()
    expect: Mapping[str, int] | None = None
    verify: bool = False
    dump: Dump | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def folder(self) -> Path | None:
        """Where the reproduction of a mismatch goes, if the caller named a place."""
        return self.dump.page.parent if self.dump else None


@dataclass(frozen=True)
class Lowered:
    """``folded`` is the model as kernels with equal layers stated once, as dumps show it; ``kernels`` the files of the
    distinct ones. ``whole`` has all layers, as a graph when it is asked for; ``loop`` is what runs. Where ranks divide a
    model that is to be calibrated, ``undivided`` is all of it."""

    whole: Unfolded
    loop: Loop
    kernels: list[Kernel]
    undivided: Loop | None = None

    @property
    def folded(self) -> Graph:
        return self.whole.folded

    @property
    def graph(self) -> Graph:
        """The whole model as kernels, with all its layers written out."""
        return self.whole.graph


def lower(source: Skeleton | Graph, options: Options, wishes: Wishes, report: Report, fold: bool = True) -> Lowered:
    """Capture a model, or take a graph as it is, and lower it; what happens is noted in ``report``.

    With ``fold``, a few of a deep model's equal layers go through all this and stand for the others.

    Raises:
        UnsupportedModelError, ExpectationError, VerificationError, UnknownPassError, OptionError: see ``compile``.
    """
    skip = _switches(wishes.skip)
    stated = passes.ModelPlan()
    if isinstance(source, Graph):
        graph = source
    else:
        with report.timed("capture"), wishes.progress.line("capture"):
            choices: dict[str, Any] = {"kv_block": options.kv_cache.block_size}
            if options.kv_dtype:
                choices[passes.KV_DTYPE] = options.kv_dtype
            if options.quantization:
                choices[passes.QUANTIZATION] = passes.spelled(options.quantization)
            if options.smoothing:
                choices[passes.SMOOTHING] = True
            if options.tensor_parallel > 1:
                choices[passes.TENSOR_PARALLEL] = options.tensor_parallel
                stated = passes.plan_of(source.model)
                choices |= passes.choices_of(stated, source.model)
                if options.calibrated:
                    choices[passes.CALIBRATION] = True
            if options.replicated:
                choices[passes.REPLICATED] = ", ".join(options.replicated)
            if options.expert_parallel:
                choices[passes.EXPERT_PARALLEL] = ", ".join(options.expert_parallel)
            # A pattern with numbers may tell equal layers apart.
            patterns = [*options.quantization, *options.replicated, *options.expert_parallel, *stated.patterns]
            fold = fold and not any(re.search(r"[0-9?\[]", pattern) for pattern in patterns)
            graph = capture(source, choices, options.max_seq_len, fold)
    captured, undivided = graph, None
    if wishes.dump:
        wishes.dump.graph("capture", graph)
    names, done = _remaining(graph), []
    with report.timed("passes"):
        steps = passes.steps(graph, names, check=wishes.verify, skip=skip)
        if wishes.verify:
            steps = passes.verified(graph, steps, names, wishes.folder)
        for step in wishes.progress.bar(steps, "passes", len(names)):
            if step.name == "Shard" and options.calibrated and options.tensor_parallel > 1:
                undivided = graph
            graph = step.graph
            done.append(step.report)
            if step.name == "Shard" and stated.patterns:
                report.model_plan = passes.compare(stated, graph, step.report)
            if wishes.dump:
                wishes.dump.graph(step.name, graph)
        verify_graph(graph)
        try:
            whole = unfold(graph)
            all_of_it = None if undivided is None else loop_of(unfold(_paged(undivided, names, skip)))
        except NotPeriodic as why:
            if isinstance(source, Graph):
                raise VerificationError(f"the folded layers of this graph are not alike: {why}") from why
            whole = None
    if whole is None:  # a pass treated neighbouring layers in different ways
        if wishes.dump:
            wishes.dump.restart()
        return lower(source, options, wishes, report, fold=False)
    report.capture(captured)
    report.note_passes(done, fold_of(captured))
    with report.timed("codegen"):
        kernels = emit_kernels(graph)
    for kernel in kernels:
        kernel.regions = [copy for region in kernel.regions for copy in whole.copies[region]]
    report.kernels(whole, kernels)
    if wishes.verify:
        with report.timed("verify kernels"), wishes.progress.line("verify kernels"):
            checked = verify_kernels(kernels, options.device, wishes.folder)
        report.verification = f"every pass keeps the numbers; {checked}"
    if wishes.dump:
        wishes.dump.finish(kernels, report)
    check_expectations(wishes.expect or {}, report)
    return Lowered(whole, loop_of(whole), kernels, all_of_it)


def _paged(undivided: Graph, names: Sequence[str], skip: passes.Switches) -> Graph:
    """The graph in front of what divides it, over the paged cache."""
    later = names.index("Localize") + 1
    left = [name for number, name in enumerate(names, 1) if number > later and not skip.whole(number, name)]
    return passes.run(undivided, [name for name in left if name != "GroupKernels"])


def _switches(skip: Sequence[str | int]) -> passes.Switches:
    found = passes.switches(skip, passes.PASSES)
    pipeline = passes.PASSES.pipeline
    for number, name in enumerate(pipeline, start=1):
        if name in passes.NEEDED and found.whole(number, name):
            raise OptionError(f"skip: {name} cannot be switched off: without it the graph does not run over a KV cache")
    if any(not 1 <= number <= len(pipeline) for number in found.numbers):
        raise OptionError(f"skip: passes have the numbers 1 to {len(pipeline)}, not {sorted(found.numbers)}")
    return found


def _remaining(graph: Graph) -> tuple[str, ...]:
    """The passes that a graph has still to go through: all, or, for one read from a late dump, what is left of them."""
    inputs = {node.name for node in graph.inputs()}
    if not {"block_tables", "rows"} <= inputs:
        return passes.PASSES.pipeline
    grouped = any(node.meta.get("region") is not None for node in graph.calls())
    return () if grouped else ("GroupKernels",)
