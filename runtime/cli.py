"""The command line: ``fuseline run``, ``dump``, ``explain``, ``opt``, ``quantize``, ``bench`` and ``eval``."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import ir, passes
from ..ir.errors import FuselineError, InvalidRequestError
from ..ir.skeleton import skeleton
from .arguments import CacheDtype, Device, Dtype, ExpertParallel, MaxSeqLen, Model, Quantization, TensorParallel
from .bench.command import bench
from .calibration.texts import Calibration
from .compile import compile
from .compiled import CompiledModel
from .dumps import Dump
from .evaluation.command import evaluate
from .events import TokenEvent
from .explain import explain as explanation
from .lower import Lowered, Wishes, lower
from .models import resolve, tokenizer_of
from .mpi import one_job
from .options import (
    KVCacheConfig,
    OptionError,
    positive,
    quantization_of,
    refuse_ranks,
    resolve_device,
    resolve_dtype,
    resolve_patterns,
    resolve_quantization,
)
from .options import resolve as resolve_sizes
from .progress import Progress, quiet_transformers
from .quantize import quantize
from .ranks import path_of_rank, rank_of
from .report import Report, two_columns
from .sequence import SamplingParams
from .streaming import TextStream

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile a Hugging Face causal LM into fused kernels, run it, and look at what it was compiled to.",
)

app.command()(bench)
app.command("eval")(evaluate)


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    no_chat: Annotated[bool, typer.Option("--no-chat", help="Continue the text, with no chat template.")] = False,
    max_seq_len: MaxSeqLen = None,
    quantization: Quantization = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Round the weights by GPTQ.")] = False,
    kv_cache: CacheDtype = None,
    tensor_parallel: TensorParallel = 1,
    expert_parallel: ExpertParallel = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run all ranks in this process.")] = False,
) -> None:
    """Generate text. The text goes to stdout as it is made, progress and a short table to stderr."""
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed)
    params.validate()
    quiet_transformers()
    first = tensor_parallel == 1 or not rank_of()  # one of the ranks speaks for all
    with one_job(tensor_parallel):
        path = resolve(model)
        tokenizer = tokenizer_of(path)
        tokens = _encode(tokenizer, prompt, chat=not no_chat)
        compiled = compile(
            path,
            device=device,
            dtype=dtype,
            max_batch_size=1,
            max_seq_len=max_seq_len,
            quantization=_wanted(quantization),
            calibration=Calibration() if calibrate else None,
            kv_cache=KVCacheConfig(dtype=kv_cache),
            tensor_parallel=tensor_parallel,
            simulate=simulate,
            expert_parallel=expert_parallel or (),
            progress=first,
        )
        speed = _stream(compiled, tokenizer, tokens, params, first)
        compiled.close()
    if first:
        Console(stderr=True).print(two_columns([*compiled.report.rows(), *speed]))


@app.command()
def dump(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the graph after each pass, the kernels, the report here.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write one page to look at all of it in a browser.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_seq_len: MaxSeqLen = None,
    quantization: Quantization = None,
    kv_cache: CacheDtype = None,
    tensor_parallel: TensorParallel = 1,
    expert_parallel: ExpertParallel = None,
) -> None:
    """Show what a model is compiled to: its lowered graph on stdout, numbered files, or a page. No weights are read."""
    quiet_transformers()
    if html and html.suffix != ".html":
        raise OptionError(f"--html {html}: the name of the page must end with .html")
    lowered, _ = _lower(
        model, device, dtype, max_seq_len, quantization, kv_cache, tensor_parallel, expert_parallel, out or html
    )
    out, html = (path and path_of_rank(path) for path in (out, html))
    if out is not None:
        last, page = max(out.glob("[0-9][0-9][0-9]_*.txt")), out / "index.html"
        print(f"lowered graph: {last}\nkernels:       {out / 'kernels'}\nreport:        {out / 'report.txt'}")
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, html)
        html = html or page
    print(f"page:          {html}\n" if html else lowered.folded, end="")


@app.command()
def explain(
    model: Model,
    layer: Annotated[int | None, typer.Option(help="Only this layer, with the lines of its kernels.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_seq_len: MaxSeqLen = None,
    quantization: Quantization = None,
    kv_cache: CacheDtype = None,
    tensor_parallel: TensorParallel = 1,
    expert_parallel: ExpertParallel = None,
) -> None:
    """Say what was fused, what was not and why, and what almost was. No weights are read."""
    quiet_transformers()
    lowered, report = _lower(
        model, device, dtype, max_seq_len, quantization, kv_cache, tensor_parallel, expert_parallel
    )
    try:
        print(explanation(lowered.graph, report, layer), end="")
    except ValueError as error:
        raise OptionError(str(error)) from error


@app.command()
def opt(
    file: Annotated[typer.FileText, typer.Argument(metavar="FILE", help="The text of a graph; - reads stdin.")],
    names: Annotated[str, typer.Option("-p", "--passes", help="Passes to run, in order: FuseSiluMul,MergeQKV")],
) -> None:
    """Run passes on the text of a graph and print the text after them; what each did goes to stderr."""
    graph = ir.parse(file.read())
    ir.verify(graph)
    for step in passes.steps(graph, [name.strip() for name in names.split(",")], check=True):
        graph, done = step.graph, step.report
        print(f"{step.name}: {len(done.fused)} fused, {len(done.refused)} refused", file=sys.stderr)
        for item in done.refused:
            print(f"  {item.site}: {item.why}", file=sys.stderr)
    print(graph, end="")


@app.command("quantize")
def write_quantized(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory for the checkpoint.")],
    quantization: Annotated[str, typer.Option(metavar="SCHEME", help="As for run.")],
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Round the weights by GPTQ.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Round the weights of a model and write them as a checkpoint of compressed-tensors."""
    quiet_transformers()
    calibration = Calibration() if calibrate else None
    wanted = quantization_of(quantization)
    print(quantize(resolve(model), out, wanted, calibration=calibration, device=device, dtype=dtype, progress=True))


def _wanted(quantization: str | None) -> str | dict[str, str | None] | None:
    return quantization_of(quantization) if quantization else None


def _lower(
    model: str,
    device: str | None,
    dtype: str | None,
    max_seq_len: int | None,
    quantization: str | None,
    kv_cache: str | None,
    tensor_parallel: int,
    expert_parallel: list[str] | None,
    out: Path | None = None,
) -> tuple[Lowered, Report]:
    """A model lowered to kernels, without its weights."""
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    by_expert = resolve_patterns("expert_parallel", expert_parallel or ())
    refuse_ranks(tensor_parallel, False, {"expert_parallel": by_expert}, False, None)
    report = Report(device=str(place), dtype=str(kind).removeprefix("torch."))
    with report.timed("read the model"):
        bones = skeleton(resolve(model), kind)
    report.model = type(bones.model).__name__
    config = bones.model.config.get_text_config()
    options = resolve_sizes(config, place, kind, 1, max_seq_len, None, KVCacheConfig(dtype=kv_cache))
    options = replace(
        options,
        quantization=resolve_quantization(_wanted(quantization)),
        tensor_parallel=positive("tensor_parallel", tensor_parallel),
        expert_parallel=by_expert,
    )
    wishes = Wishes(dump=Dump(out) if out else None, progress=Progress(True))
    return lower(bones, options, wishes, report), report


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        # The template spells the special tokens out.
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise InvalidRequestError("the prompt is empty: give at least one word, or drop --no-chat")
    return list(tokens)


def _stream(
    compiled: CompiledModel, tokenizer: Any, tokens: list[int], params: SamplingParams, speaks: bool
) -> list[tuple[str, str]]:
    """Generate and print, if this process ``speaks``; returns the rows about speed."""
    text = TextStream(tokenizer, tokens)
    times = [time.perf_counter()]

    def show(event: TokenEvent) -> None:
        times.append(time.perf_counter())
        if speaks:
            print(text.add(event.token), end="", flush=True)

    compiled.engine.add(tokens, replace(params, stop_token_ids=tuple(compiled.eos_token_ids)))
    compiled.engine.run(show)
    if speaks:
        print(flush=True)
    rows = [("prefill", f"{len(tokens)} tokens, {len(tokens) / (times[1] - times[0]):.1f} tokens/s")]
    if len(times) > 2:
        rows.append(("decode", f"{len(times) - 2} tokens, {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"))
    return rows


def main() -> None:
    """The console entry: 0 is success, 1 an error of Fuseline's, which is printed in a line, 2 wrong usage."""
    try:
        app()
    except FuselineError as error:
        # A KeyError would print its message in quotes.
        print(f"fuseline: {error.args[0] if error.args else error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
