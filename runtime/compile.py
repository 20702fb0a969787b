"""``compile``: from a model to something that generates."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import passes
from ..codegen.kernels import emit_kernels
from ..codegen.launch import load_launches
from ..codegen.verification import verify_kernels
from ..ir.capture import MAX_STEP_TOKENS, capture
from ..ir.errors import ExpectationError
from ..ir.graph import Graph, type_of
from ..ir.infer import Inference
from ..ir.skeleton import skeleton
from ..ir.verify import verify as verify_graph
from .compiled import CompiledModel
from .dumps import Dump
from .engine import Engine
from .executor import Executor, cache_bytes_per_token, fold_constants, new_caches
from .options import KVCacheConfig, OptionError, Options, positive, refuse_later, resolve_device, resolve_dtype
from .packed import pack_linears
from .report import Report
from .selfcheck import check_concatenation, check_source, source_prompts

Item = TypeVar("Item")

# Legal reordering of sums moves fp32 logits by about 1e-6 and rounded ones by a few percent; real mixing by far more.
_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def compile(
    model: PreTrainedModel | str | Path | Graph,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_batch_size: int = 64,
    max_seq_len: int | None = None,
    max_step_tokens: int | None = None,
    kv_cache: KVCacheConfig | None = None,
    quantization: object = None,
    tensor_parallel: int = 1,
    schedule: str = "auto",
    expect: Mapping[str, int] | None = None,
    verify: bool = False,
    dump: str | Path | None = None,
    weights: PreTrainedModel | str | Path | None = None,
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
        kv_cache: block size and number of tokens of the KV cache.
        expect: how often passes must have fired, by name; ``{"MergeQKV": 30}``.
        verify: check every graph between the passes (types, names, text round trip), compare the numbers of each with
            those of the graph before it, and those of each kernel with its region's reference: in fp32, on random inputs
            and weights. A reproduction of a mismatch goes to ``dump``, else to ``fuseline-verification/``.
        dump: a directory for the text after each pass, the kernels and the report.
        progress: show progress bars on stderr.

    Raises:
        UnsupportedModelError: the model cannot be compiled without the risk of wrong answers.
        VerificationError: with ``verify``, a pass or a kernel computes other numbers; names it, the site and the error.
        ExpectationError: ``expect`` was not met. OptionError: an option makes no sense or is not available yet.
    """
    kv_cache = kv_cache or KVCacheConfig()
    refuse_later(quantization, tensor_parallel, schedule, kv_cache)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    report = Report(device=str(place), dtype=str(kind).removeprefix("torch."))
    show = _progress(progress)

    source = model if weights is None else weights
    if isinstance(source, Graph):
        raise OptionError("a graph has no weights: pass weights=<the model it was made from>")
    with report.timed("read the model"):
        bones = skeleton(source, kind, trust_remote_code)
    config = bones.model.config.get_text_config()
    report.model = type(bones.model).__name__
    options = _resolve(config, place, kind, max_batch_size, max_seq_len, max_step_tokens, kv_cache)

    record = Dump(dump) if dump is not None else None
    if isinstance(model, Graph):
        graph = model
    else:
        with report.timed("capture"), _spinner(progress, "capture"):
            graph = capture(bones, {"kv_block": kv_cache.block_size}, options.max_seq_len)
    report.capture(graph)
    if record:
        record.graph("capture", graph)
    names = list(passes.PASSES.pipeline) if not _is_lowered(graph) else []
    with report.timed("passes"):
        running = passes.steps(graph, names, check=verify)
        if verify:
            running = passes.verified(graph, running, names, dump)
        for step in show(running, "passes", len(names)):
            graph = step.graph
            report.passes.append(step.report)
            if record:
                record.graph(step.name, graph)
    verify_graph(graph, Inference())
    _check_expectations(expect, report)

    with report.timed("codegen"):
        kernels = emit_kernels(graph)
    report.kernels(graph, kernels)
    if verify:
        with report.timed("verify kernels"), _spinner(progress, "verify kernels"):
            report.verification = f"every pass keeps the numbers; {verify_kernels(kernels, place, dump)}"
    launches = load_launches(kernels) if place.type == "cuda" else None
    with report.timed("load weights"), _spinner(progress, "load weights"):
        values = bones.load()
    vocab = type_of(_result(graph)).shape[-1]
    assert isinstance(vocab, int)
    expected: list[tuple[list[int], torch.Tensor]] = []
    if not isinstance(model, Graph):  # a graph may have been changed on purpose
        with report.timed("run the model itself"), _spinner(progress, "run the model itself"):
            expected = [(prompt, bones.score(prompt)) for prompt in source_prompts(vocab, options.max_seq_len)]
    bones.forget()
    with report.timed("place weights"):
        constants = fold_constants(graph, values, place, lambda items: show(items, "weights", None))
        del values
        linears, packed_bytes = pack_linears(graph, constants)

    block = graph.options.get("kv_block", 16)

    def on_cache(num_slots: int, fill: float | None = None) -> Executor:
        return Executor(graph, constants, new_caches(graph, num_slots, place, fill), place, launches, linears)

    with report.timed("self-check"), _spinner(progress, "self-check"):
        report.self_check = check_concatenation(
            lambda slots: on_cache(slots, float("nan")),
            vocab,
            block,
            place,
            _CHECK_TOLERANCE[kind],
            kind == torch.float32,
            options.max_seq_len,
        )
        own = torch.float32 if kind == bones.source_dtype else bones.source_dtype
        check_source(
            lambda slots: on_cache(slots, float("nan")),
            expected,
            block,
            place,
            max(_CHECK_TOLERANCE[kind], _CHECK_TOLERANCE.get(own, 0.0)),
        )
    blocks = _pool_blocks(graph, options, block)
    report.memory(
        sum(item.numel() * item.element_size() for item in constants.values()) + packed_bytes,
        blocks,
        block,
        cache_bytes_per_token(graph),
    )
    engine = Engine(
        on_cache(blocks * block),
        num_blocks=blocks,
        block_size=block,
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        max_step_tokens=options.max_step_tokens,
        vocab_size=vocab,
        device=place,
    )
    compiled = CompiledModel(graph, kernels, report, engine, options, bones.model.generation_config, config)
    if record:
        record.finish(kernels, report)
    return compiled


def _result(graph: Graph) -> Any:
    return graph.output_node().args[0]


def _is_lowered(graph: Graph) -> bool:
    """Whether a graph read from a dump has been through the whole pipeline already."""
    return any(node.name == "block_tables" for node in graph.inputs()) and any(
        node.name == "rows" for node in graph.inputs()
    )


def _resolve(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_batch_size: int,
    max_seq_len: int | None,
    max_step_tokens: int | None,
    kv_cache: KVCacheConfig,
) -> Options:
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if max_seq_len is None:
        max_seq_len = int(limit) if limit and limit > 0 else 4096
    positive("max_seq_len", max_seq_len)
    if limit is not None and 0 < limit < max_seq_len:
        raise OptionError(f"max_seq_len={max_seq_len} is more than the model's max_position_embeddings={limit}")
    if max_step_tokens is None:
        max_step_tokens = 2048 if device.type == "cuda" else 512
    batch = positive("max_batch_size", max_batch_size)
    if positive("max_step_tokens", max_step_tokens) > MAX_STEP_TOKENS:
        raise OptionError(f"max_step_tokens={max_step_tokens} is more than {MAX_STEP_TOKENS}")
    if kv_cache.max_tokens is not None:
        positive("KVCacheConfig.max_tokens", kv_cache.max_tokens)
    return Options(device, dtype, batch, max_seq_len, max(max_step_tokens, batch), kv_cache)


def _pool_blocks(graph: Graph, options: Options, block_size: int) -> int:
    """Blocks of the KV cache: as asked for, else all that the batch can use and half of the free memory can hold."""
    if options.kv_cache.max_tokens is not None:
        return max(1, options.kv_cache.max_tokens // block_size)
    useful = options.max_batch_size * -(-options.max_seq_len // block_size)
    if options.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(options.device)[0] * 0.8)
    else:
        free = min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, 2 << 30)
    fits = free // max(1, cache_bytes_per_token(graph) * block_size)
    return max(1, min(useful, fits))


def _check_expectations(expect: Mapping[str, int] | None, report: Report) -> None:
    for name, wanted in (expect or {}).items():
        mine = [item for item in report.passes if item.name == name]
        if not mine:
            raise ExpectationError(
                f"expect={{{name!r}: {wanted}}}: no pass of that name ran; "
                f"there are {sorted({item.name for item in report.passes})}"
            )
        found = sum(len(item.fused) for item in mine)
        if found != wanted:
            refused = [f"  {item.site}: {item.why}" for entry in mine for item in entry.refused]
            detail = "\n".join(refused) or "  no site was refused: the pattern was found nowhere else"
            raise ExpectationError(f"{name} was to fuse {wanted} sites and fused {found}. Refused sites:\n{detail}")


def _progress(on: bool) -> Callable[..., Iterator[Any]]:
    def show(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
        yield from tqdm(items, desc=what, total=total, file=sys.stderr, disable=not on, leave=False)

    return show


@contextmanager
def _spinner(on: bool, what: str) -> Iterator[None]:
    """A line on stderr while something runs that cannot be counted."""
    begin = time.perf_counter()
    if on:
        print(f"{what} ...", end="\r", file=sys.stderr, flush=True)
    yield
    if on:
        print(f"{what}: {time.perf_counter() - begin:.1f} s   ", file=sys.stderr, flush=True)
