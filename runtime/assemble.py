"""From an executor to an engine: decode steps, their CUDA graphs, and the memory that was planned for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..ir.dist import ALONE, Group
from ..ir.loop import Loop
from .caches import cache_bytes_per_token
from .choices import Choices
from .decode import DecodeSteps
from .engine import Engine
from .memory import Load, MemoryPlan
from .options import Options
from .parts import RankModel
from .rehearsal import rehearse
from .replay import GraphReplay, NotCapturable
from .report import Report
from .static_step import StaticStep
from .tables import table_width
from .vocabulary import Vocabulary

# Tokens of prompts that are rehearsed beside the largest step.
_REHEARSED = (2, 4, 8, 16, 32, 64, 128, 256)


def load_of(options: Options) -> Load:
    """The largest step under these options."""
    tokens = min(options.max_step_tokens, options.max_batch_size * options.max_seq_len)
    return Load(tokens, options.max_batch_size, options.graphs and options.device.type == "cuda")


def pool_limits(loop: Loop, options: Options, block_size: int) -> tuple[int, int | None]:
    """Most blocks for the KV cache, and the bytes that it has to share with the model, if those decide.

    Without ``kv_cache.max_tokens``, all blocks that the largest batch can use; on the CPU, what a quarter of the free
    memory, and 2 GiB, hold of them.
    """
    if options.kv_cache.max_tokens is not None:
        return max(1, options.kv_cache.max_tokens // block_size), None
    useful = options.max_batch_size * -(-options.max_seq_len // block_size)
    if options.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(options.device)
        idle = torch.cuda.memory_reserved(options.device) - torch.cuda.memory_allocated(options.device)
        return useful, int(total * options.kv_cache.memory_share) - (total - free - idle)
    free = min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, 2 << 30)
    return max(1, min(useful, free // max(1, cache_bytes_per_token(loop) * block_size))), None


def assemble(
    executor: RankModel,
    plan: MemoryPlan,
    options: Options,
    block_size: int,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
    report: Report,
    groups: Sequence[Group] = (ALONE,),
) -> tuple[Engine, DecodeSteps]:
    """The engine of an executor whose cache has the planned blocks and one more, and its decode steps.

    It returns logits of a ``vocabulary`` in ``dtype``. On a GPU the largest step is run once, and decode steps are
    recorded as CUDA graphs if that is asked for and can be; what came of it is noted in ``report``. ``groups`` are the ranks
    that this process runs: if it is one of several, they choose one token together.
    """
    batch, device, scratch = options.max_batch_size, options.device, plan.blocks
    static = StaticStep(batch, table_width(options.max_seq_len, block_size), block_size, scratch, device, vocabulary)
    logits = torch.empty(batch, vocabulary.columns, dtype=dtype, device=device)
    decode = DecodeSteps(executor.into, static, batch, logits)
    if device.type == "cuda":
        # Other kernels are chosen for other numbers of rows: none is to be compiled while a request waits.
        load, draws = load_of(options), Choices(static.capacity, device, vocabulary)
        for tokens in _REHEARSED:
            if tokens < min(load.tokens, options.max_seq_len):
                rehearse(executor, replace(load, tokens=tokens, batch=1), block_size, scratch, draws)
        rehearse(executor, load, block_size, scratch, draws)
    recorded = options.graphs and _record(decode, report)
    engine = Engine(
        executor,
        num_blocks=plan.blocks,
        block_size=block_size,
        max_batch_size=batch,
        max_seq_len=options.max_seq_len,
        max_step_tokens=options.max_step_tokens,
        vocabulary=vocabulary,
        device=device,
        decode=decode if recorded else None,
        lookahead=options.lookahead,
        group=groups[0] if len(groups) == 1 else ALONE,
    )
    return engine, decode


def _record(decode: DecodeSteps, report: Report) -> bool:
    """Have decode steps replayed as CUDA graphs where there is a GPU; False if they cannot be recorded."""
    device = decode.static.device
    report.graphs = f"decode in {len(decode.buckets)} sizes up to {decode.buckets[-1]}"
    if device.type != "cuda":
        report.graphs += ", as plain calls"
        return True
    try:
        replay = GraphReplay(decode.compute, decode.buckets, device)
    except NotCapturable as why:
        report.graphs = f"none: {why}"
        return False
    decode.replay = replay
    report.graph_bytes = replay.memory()
    return True
