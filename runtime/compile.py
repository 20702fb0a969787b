"""``compile``: from a model to something that generates."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import passes
from ..codegen.launch import load_launches
from ..codegen.tuning import Choices
from ..ir.cache_rounding import rounds_cache
from ..ir.graph import Graph, type_of
from ..ir.period import fold_of
from ..ir.quantized import rounds_rows
from ..ir.skeleton import skeleton
from .assemble import assemble, load_of, pool_limits
from .calibration.activations import calibrate
from .calibration.texts import Calibration, windows_of
from .compiled import CompiledModel
from .dumps import Dump
from .garbage import rarely_searched_for_garbage
from .join import gpu_of_rank
from .lower import Wishes, lower
from .memory import plan_memory
from .options import (
    KVCacheConfig,
    OptionError,
    refuse_later,
    refuse_ranks,
    refuse_schemes,
    resolve,
    resolve_device,
    resolve_dtype,
    resolve_patterns,
    resolve_quantization,
)
from .parts import RankModel, agreed, check_alike, exchange_of, groups_of, model_on, place_parts, said_by_first
from .progress import Progress
from .rehearsal import Meter
from .report import Report
from .selfcheck import check_concatenation, check_source, most_slots
from .started import compiled_on_ranks, starts_ranks
from .step import Model
from .step_tuning import tune_steps
from .tune import TUNING_SECONDS, listed, replayed, tune_kernels
from .vocabulary import Vocabulary, vocabulary_of
from .yardstick import Yardstick, yardstick_of

# Legal reordering of sums moves fp32 logits by about 1e-6 and rounded ones by a few percent; real mixing by far more.
_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# Where steps round, what lies half-way between two codes may become either.
_CODES_TOLERANCE = {torch.float32: 5e-2, torch.float16: 0.25, torch.bfloat16: 0.25}


@rarely_searched_for_garbage
def compile(
    model: PreTrainedModel | str | Path | Graph,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_batch_size: int = 64,
    max_seq_len: int | None = None,
    max_step_tokens: int | None = None,
    kv_cache: KVCacheConfig | None = None,
    quantization: str | Mapping[str, str | None] | None = None,
    calibration: Calibration | None = None,
    tensor_parallel: int = 1,
    simulate: bool = False,
    replicated: Sequence[str] = (),
    expert_parallel: Sequence[str] = (),
    schedule: str = "auto",
    graphs: bool | None = None,
    lookahead: bool | None = None,
    tuning: bool | str | Path = True,
    skip: Sequence[str | int] = (),
    expect: Mapping[str, int] | None = None,
    verify: bool = False,
    dump: str | Path | None = None,
    weights: PreTrainedModel | str | Path | Mapping[str, torch.Tensor] | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> CompiledModel:
    """Compile a Hugging Face causal LM.

    Args:
        model: a live ``transformers`` model (left as it is), a local path, a ``.gguf`` file, a hub id; or a graph read
            from a dump, in which case ``weights`` names the model that its weights come from.
        device, dtype: default to the GPU in bf16 if there is one, else to the CPU in fp32.
        max_batch_size: sequences in one step. max_seq_len: tokens of a sequence, prompt and answer; defaults to the
            model's ``max_position_embeddings``. max_step_tokens: tokens in one step, prefill included.
        kv_cache: block size, number of tokens and element type of the KV cache; on a GPU it takes by default what
            weights and steps leave of 85 % of the memory.
        quantization: hold the weights of projections in fewer bits, rounded to nearest: ``"int8"`` (a factor for each
            output channel), ``"int4g128"`` (or ``"int4"``; a factor for each 128 inputs), ``"int4g64"``, ``"int4g32"``,
            and with zero points ``"uint4g128"``, ``"uint4g64"``, ``"uint4g32"``; or weights and activations, these with
            a factor for each token, in ``"int8-dynamic"`` or ``"fp8"`` (E4M3; on GPUs of compute capability 8.9 and on
            the CPU); or schemes by pattern over weight names, of which the first that fits decides
            (``{"*.down_proj": "int8", "*.lm_head": None, "*": "int4"}``). Embeddings stay as they are, and so do the
            output projection and routers unless a pattern other than ``"*"`` fits. A checkpoint that is quantized
            already is read as it is.
        calibration: round weights by GPTQ instead of to nearest, so that what the model computes on this text changes
            least; ``Calibration()`` takes sources of Python's library. With ``"int8-dynamic"`` rows are smoothed as well
            (SmoothQuant). Needs ``quantization``.
        tensor_parallel: so many ranks divide the model among them, each with its part of the weights and of the KV cache.
            They are the processes that ``mpirun`` or ``torchrun`` started; in a process that none of them started, the
            others are started here, one for each GPU or on the CPU, and end with the model (see ``CompiledModel.close``).
        simulate: run all ranks in this process, on the CPU, each in a thread.
        replicated: patterns of weights, as for ``quantization``, that every rank is to hold whole.
        expert_parallel: patterns of weights of experts (``"*.experts.*"``) of which each rank is to hold some of the experts
            whole, and not a part of each.
        graphs: run steps that only decode as CUDA graphs, recorded here for a few batch sizes that others are padded
            to; the default on a GPU. On the CPU the same padded steps are plain calls, for tests.
        lookahead: launch each step before the tokens of the last are known to the host; the default on a GPU.
        tuning: on a GPU, measure the tilings of matmuls against each other (40 seconds at most), once for each GPU:
            what was measured is kept in the user's cache. ``False``: each kernel takes the tilings of its file. The
            path of a dump's ``report.json``: those that it lists.
        skip: what is not to be done: a pass by name (``"FuseRope"``) or by its number in the dumps (``17``), or one
            application of it by its number from 0 (``"FuseRope#3"``).
        expect: how often passes must have fused, by name (``{"MergeQKV": 30}``), and ``"kernels_per_layer"``.
        verify: check every graph between the passes (types, names, text round trip), compare the numbers of each with
            those of the graph before it, and those of each kernel with its region's reference: in fp32, on random inputs
            and weights. A reproduction of a mismatch goes to ``dump``, else to ``fuseline-verification/``.
        dump: a directory for the text after each pass, the kernels, the report and a page to look at all of it; or
            a file that ends with ``.html`` for the page alone.
        weights: for a graph, the model that its weights come from. For a ``transformers`` model that was built under
            ``torch.device("meta")``, a mapping from the names of ``named_parameters()`` (of tied ones any) to tensors on
            any device, which may make or read each when it is asked for: once for each place that uses it (and each rank
            that runs here), and only what the compiled model holds is kept. Buffers that are on the meta device, too, get
            the values that the config gives. There is no model then to compare with, as the report says.
        progress: show progress bars on stderr.

    Raises:
        UnsupportedModelError: the model cannot be compiled without the risk of wrong answers.
        VerificationError: with ``verify``, a pass or a kernel computes other numbers; names it, the site and the error.
        ExpectationError: ``expect`` was not met (what ``dump`` asks for is written all the same).
        WeightsError: ``weights`` lacks a name, or a tensor has another shape than the parameter.
        OptionError: an option makes no sense or is not available yet. UnknownPassError: ``skip`` names no pass.
    """
    arguments = dict(locals())
    if starts_ranks(tensor_parallel, simulate):
        return compiled_on_ranks(compile, arguments)
    kv_cache = kv_cache or KVCacheConfig()
    wanted = resolve_quantization(quantization)
    refuse_later(schedule, kv_cache)
    if calibration and not wanted and not isinstance(model, Graph):
        raise OptionError("calibration is for the weights that quantization rounds: ask for a scheme, or leave it out")
    place = resolve_device(device)
    if tensor_parallel != 1 and place.type == "cuda" and torch.device(device or "cuda").index is None:
        place = gpu_of_rank()
    groups = groups_of(tensor_parallel, simulate, place)
    patterns = {"replicated": replicated, "expert_parallel": expert_parallel}
    kept, by_expert = (resolve_patterns(name, wanted) for name, wanted in patterns.items())
    refuse_ranks(tensor_parallel, simulate, patterns, calibration is not None, model)
    refuse_schemes(passes.wanted_of(model) if isinstance(model, Graph) else wanted, place)
    kind = resolve_dtype(dtype, place)
    meter = Meter(place) if place.type == "cuda" else None
    report = Report(device=str(place), dtype=str(kind).removeprefix("torch."))
    show = Progress(progress)

    given = weights if isinstance(weights, Mapping) else None
    source: Any = model if weights is None or given is not None else weights
    if isinstance(source, Graph):
        raise OptionError("a graph has no weights: pass weights=<the model it was made from>")
    if isinstance(model, Graph) and wanted:
        raise OptionError("a graph from a dump states its quantization itself; leave quantization at None")
    if isinstance(model, Graph) and kv_cache.dtype is not None:
        raise OptionError("a graph from a dump states the type of its caches itself; leave KVCacheConfig.dtype at None")
    with report.timed("read the model"):
        bones = skeleton(source, kind, trust_remote_code, given)
    if bones.schemes and wanted:
        raise OptionError("the checkpoint holds rounded weights already; leave quantization at None")
    refuse_schemes(bones.schemes, place)
    report.checkpoint = bones.held
    config = bones.model.config.get_text_config()
    report.model = type(bones.model).__name__
    gpu = place.type == "cuda"
    options = replace(
        resolve(config, place, kind, max_batch_size, max_seq_len, max_step_tokens, kv_cache),
        quantization=wanted,
        tensor_parallel=tensor_parallel,
        replicated=kept,
        expert_parallel=by_expert,
        calibrated=calibration is not None,
        smoothing=calibration is not None and "int8d" in wanted.values(),
        graphs=gpu if graphs is None else graphs,
        lookahead=gpu if lookahead is None else lookahead,
    )
    record = Dump(dump) if dump is not None else None
    wishes = Wishes(skip, expect, verify, record, show)
    lowered = lower(model if isinstance(model, Graph) else bones, options, wishes, report)
    loop, kernels = lowered.loop, lowered.kernels
    if len(groups) == 1:
        check_alike(groups[0], loop.graph)
    exchange = exchange_of(groups, loop)
    if exchange is not None:
        report.meetings = exchange.summary()
    with report.timed("load weights"), show.line("load weights"):
        # One rank shares what the model holds that it is compared with.
        values = (bones.lazy() if tensor_parallel > 1 else None) or bones.load()
    vocabulary = vocabulary_of(loop.graph, groups, place, exchange)
    vocab = vocabulary.size
    yardstick = Yardstick()
    # A graph may have been changed on purpose, and rounded weights, keys and values give other numbers; a rounded
    # checkpoint's model has the same, unless steps round as well.
    codes = rounds_rows(loop.graph) or rounds_cache(loop.graph)
    if not isinstance(model, Graph) and not options.quantization and not codes:
        with report.timed("run the model itself"), show.line("run the model itself"):
            fold = fold_of(lowered.folded) if loop.repeats else None
            apart = 1 if simulate else tensor_parallel
            yardstick, report.source_check = yardstick_of(bones, values, fold, vocab, options.max_seq_len, apart)
    bones.forget()
    block = loop.graph.options.get("kv_block", 16)
    launched = {region for kernel in kernels for region in kernel.regions} if gpu else set()
    most, budget = pool_limits(loop, options, block)
    plan = plan_memory(loop, launched, values, place, load_of(options), block, most, budget)
    plan = replace(plan, blocks=agreed(groups, plan.blocks))
    report.memory(plan, block)
    few = loop.short if loop.repeats else loop
    rounded: Mapping[str, torch.Tensor] = {}
    if calibration:
        with report.timed("calibrate"):
            texts = windows_of(calibration, source, vocab, options.max_seq_len)
            whole_model = lowered.undivided or loop
            found = calibrate(whole_model, values, texts, block, place, lambda items: show.bar(items, "calibrate"))
            rounded, report.calibration = found.values, found.summary
            del found  # of what ranks divide, each keeps its part alone
    with report.timed("place weights"):
        parts, few_parts = place_parts(
            loop, few, values, place, rounded, groups, lambda items: show.bar(items, "weights")
        )
        del values, rounded
    launches = None
    if gpu:
        with report.timed("tuning"):
            choices: dict[str, Choices] = {}
            if isinstance(tuning, (str, Path)):
                choices = replayed(tuning, kernels)
            elif tuning:
                constants, few_constants = parts[0].constants, few_parts[0].constants
                until, batch = time.perf_counter() + TUNING_SECONDS, options.max_batch_size
                measured = tune_kernels(
                    kernels, loop, constants, place, batch, until, lambda items: show.bar(items, "tuning")
                )
                choices = tune_steps(measured, kernels, few, few_constants, place, block, options.max_seq_len, until)
            choices = json.loads(said_by_first(groups, json.dumps(choices)))
            report.tilings = listed(choices, kernels)
            launches = load_launches(kernels, choices, exchange)

    with report.timed("self-check"), show.line("self-check"):
        whole = sample = model_on(parts, most_slots(block), place, launches, exchange)
        if few is not loop:
            sample = model_on(few_parts, most_slots(block), place, launches, exchange)
        exact = kind == torch.float32 and not codes
        tolerance = max(_CHECK_TOLERANCE[kind], _CODES_TOLERANCE[kind] if codes else 0.0)
        report.self_check = check_concatenation(
            partial(_poisoned, sample, vocabulary), vocab, block, place, tolerance, exact, options.max_seq_len
        )
        own = torch.float32 if kind == bones.source_dtype else bones.source_dtype
        tolerance = max(tolerance, _CHECK_TOLERANCE.get(own, 0.0))
        check_source(partial(_poisoned, sample, vocabulary), yardstick.few, block, place, tolerance)
        check_source(partial(_poisoned, whole, vocabulary), yardstick.whole, block, place, tolerance)
        del whole, sample, few_parts
    if gpu:
        gc.collect()  # what tuning leaves behind refers to itself
        torch.cuda.empty_cache()  # what merging left behind lies in pieces too small for the KV cache
    with report.timed("graphs"), show.line("graphs"):
        result: Any = loop.graph.output_node().args[0]
        engine, decode = assemble(
            model_on(parts, (plan.blocks + 1) * block, place, launches, exchange),
            plan,
            options,
            block,
            vocabulary,
            type_of(result).torch_dtype,
            report,
            groups,
        )
    if meter:
        report.measured_bytes = meter.peak() + plan.shared + report.graph_bytes
    config_of = (options, bones.model.generation_config, config)
    compiled = CompiledModel(lowered.whole, kernels, report, engine, decode, *config_of)
    if record:
        record.finish(kernels, report)
    return compiled


def _poisoned(model: RankModel, vocabulary: Vocabulary) -> Model:
    """A model with whole logits, on caches that must not be read before they are written."""
    return vocabulary.of(model.poisoned())
