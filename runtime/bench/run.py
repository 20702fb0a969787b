"""A whole run: Fuseline first, then each peer, on the same model and the same work."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ...ir.graph import Graph
from ..mpi import RankError
from ..progress import Progress
from .floor import Rates, decode_bytes, prefill_operations
from .fuseline import Fuseline
from .huggingface import Eager
from .measure import CHECKED_SEQUENCES, CHECKED_TOKENS, Clock, Reference, measure_batch, measure_stream
from .peers import OURS, NotMeasured, Peer, Setup, start
from .results import Measurement
from .workloads import Batch, Stream, Workload

START = "start-up"


@dataclass(frozen=True)
class Plan:
    """What is to be measured; every result goes to ``tell`` as soon as it is there."""

    setup: Setup
    workloads: Sequence[Workload]
    peers: Sequence[str]
    clock: Clock
    rates: Rates
    machine: dict[str, object]
    tell: Callable[[Measurement], None]
    progress: Progress


def run(plan: Plan) -> list[Measurement]:
    """Measure. A participant that fails gives results with its reason, and the others go on."""
    results: list[Measurement] = []

    def done(item: Measurement) -> None:
        results.append(item)
        plan.tell(item)

    with plan.progress.line("run the model itself"):
        reference = _reference(plan)
    everybody = (OURS, *plan.peers)
    bar = plan.progress.bar(range(len(everybody) * (1 + len(plan.workloads))), "bench")
    graph: Graph | None = None
    for who in everybody:
        next(bar)
        peer, ready = _start(plan, who)
        done(ready)
        if isinstance(peer, Fuseline):
            graph = peer.compiled.graph
        for work in plan.workloads:
            next(bar)
            if peer is not None:
                done(_measure(plan, peer, work, graph, reference))
        if peer is not None:
            with suppress(Exception):  # it has been measured
                peer.close()
        del peer
        _free(plan)
    bar.close()
    plan.setup.source.release()
    return results


def _reference(plan: Plan) -> Reference:
    """The first tokens of the model itself, after the prompts that are compared later."""
    source = plan.setup.source
    reference, peer = Reference(source.dtype == torch.float32), Eager(plan.setup)
    by_length: dict[int, list[list[int]]] = {}
    for work in plan.workloads:
        if isinstance(work, Batch):
            prompts = work.prompts(source.text.vocab_size, 0)
        else:
            prompts = [request.prompt for request in work.requests(source.text.vocab_size, 0)]
        for prompt in prompts[:CHECKED_SEQUENCES]:
            by_length.setdefault(len(prompt), []).append(prompt)
    for group in by_length.values():
        for prompt, answer in zip(group, peer.generate(group, CHECKED_TOKENS)):
            reference.answers[tuple(prompt)] = answer
    return reference


def _start(plan: Plan, who: str) -> tuple[Peer | None, Measurement]:
    item = _item(plan, who, START, START)
    begin = time.perf_counter()
    try:
        peer = start(who, plan.setup)
    except RankError:
        raise
    except Exception as error:  # of somebody else's software
        item.note = _reason(error)
        peer = None
    else:
        item.ms = 1e3 * (time.perf_counter() - begin)
        item.runs = [item.ms]
    _free(plan)
    return peer, item


def _measure(plan: Plan, peer: Peer, work: Workload, graph: Graph | None, reference: Reference) -> Measurement:
    size = work.batch if isinstance(work, Batch) else work.count
    item = _item(plan, peer.name, work.name, work.label, size)
    vocab = plan.setup.source.text.vocab_size
    try:
        if isinstance(work, Batch):
            measure_batch(peer, work, vocab, plan.clock, reference, item)
        else:
            measure_stream(peer, work, vocab, plan.clock, reference, item)
    except RankError:
        raise  # of ranks that do not go together nothing more can be measured
    except Exception as error:  # of somebody else's software
        return replace(_item(plan, peer.name, work.name, work.label, size), note=_reason(error))
    if isinstance(work, Stream) or graph is None or item.ms is None:
        return item
    if work.name == "decode":
        # The context grows while it decodes; the middle is the mean.
        item.floor_ms = 1e3 * decode_bytes(graph, work.batch, work.prompt + work.new // 2) / plan.rates.copy
    else:
        item.floor_ms = 1e3 * prefill_operations(graph, work.batch, work.prompt) / plan.rates.matmul
    item.share = item.floor_ms / item.ms
    return item


def _item(plan: Plan, who: str, workload: str, label: str, batch: int = 0) -> Measurement:
    source = plan.setup.source
    kind = plan.setup.kind
    if who == OURS and plan.setup.rounding:
        kind += f", {plan.setup.rounding}"
    return Measurement(source.name, kind, who, workload, label, batch, machine=dict(plan.machine))


def _reason(error: Exception) -> str:
    """Why something was not measured, in a line."""
    text = str(error).strip().partition("\n")[0] or "no reason given"
    return text if isinstance(error, NotMeasured) else f"{type(error).__name__}: {text}"


def _free(plan: Plan) -> None:
    gc.collect()
    if plan.setup.source.device.type == "cuda":
        torch.cuda.empty_cache()
