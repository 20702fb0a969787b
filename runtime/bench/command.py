"""``fuseline bench``: reads the options, runs, and prints."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..arguments import CacheDtype, Device, Dtype, ExpertParallel, Quantization, TensorParallel
from ..mpi import one_job
from ..options import (
    OptionError,
    positive,
    quantization_of,
    refuse_ranks,
    resolve_device,
    resolve_dtype,
    resolve_kv_dtype,
    resolve_patterns,
    resolve_quantization,
)
from ..progress import Progress, quiet_transformers
from ..ranks import rank_of
from ..started import starts_ranks
from .choices import Choices, names
from .floor import measure_rates
from .launched import place_of_rank
from .measure import Clock
from .peers import OURS, Setup, known
from .plot import draw
from .results import COLUMNS, Measurement, header, machine, read, row
from .run import Plan, run
from .shapes import Source


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="What fuseline run takes, or shape:NAME (llama-3.2-1b, llama-3.1-8b, llama-2-7b, llama-2-13b, llama-2-70b) with "
            "random weights; with --plot, files that --json wrote.",
        ),
    ],
    against: Annotated[str, typer.Option(help="Peers: eager,torch-compile,hf-batching,vllm.")] = "",
    workloads: Annotated[str, typer.Option(help="Some of decode,prefill,mixed,rates.")] = "decode,prefill",
    batches: Annotated[str, typer.Option(help="decode: sequences at a time.")] = "1,8,64",
    prompt: Annotated[int, typer.Option(help="decode: tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(help="decode: tokens generated for each, at least 2.")] = 256,
    prefill: Annotated[str, typer.Option(help="prefill: prompts x tokens of each.")] = "64x128",
    requests: Annotated[int, typer.Option(help="mixed: requests, all at once.")] = 512,
    prompts: Annotated[str, typer.Option(help="mixed, rates: least and most tokens of a prompt.")] = "64-1024",
    outputs: Annotated[str, typer.Option(help="mixed, rates: least and most tokens generated.")] = "16-256",
    rates: Annotated[str, typer.Option(help="rates: requests that arrive a second.")] = "1,4,16",
    rate_seconds: Annotated[float, typer.Option(help="rates: for so many seconds each.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Fixes prompts, lengths and arrivals.")] = 0,
    repeats: Annotated[int, typer.Option(help="Runs of each workload; the median counts.")] = 3,
    seconds: Annotated[float, typer.Option(help="No further repeat of a workload after so many seconds.")] = 20.0,
    memory: Annotated[float, typer.Option(help="Share of the GPU's memory for all that a participant holds.")] = 0.85,
    max_batch_size: Annotated[int, typer.Option(help="Most sequences in a step.")] = 256,
    max_step_tokens: Annotated[int | None, typer.Option(help="Most tokens in a step of Fuseline.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_cache: CacheDtype = None,
    tensor_parallel: TensorParallel = 1,
    expert_parallel: ExpertParallel = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each result.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Draw result files; measures nothing.")] = None,
) -> None:
    """Measure Fuseline beside its peers. A table goes to stdout as it is made, progress to stderr.

    With --tensor-parallel the first rank prints and writes, and floors are those of one rank: what it must read or multiply.
    Ends with 1 if Fuseline itself failed or gave wrong tokens.
    """
    if plot is not None:
        found = read(map(Path, models))
        _make_room(plot)
        draw(found, plot)
        print(plot)
        return
    quiet_transformers()
    work = Choices(
        workloads, batches, prompt, new, prefill, requests, prompts, outputs, rates, rate_seconds, seed
    ).read()
    peers = [known(name) for name in names(against)]
    started_here = starts_ranks(tensor_parallel, False)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    if quantization:
        resolve_quantization(quantization_of(quantization))
    resolve_kv_dtype(kv_cache, kind, place)
    by_expert = resolve_patterns("expert_parallel", expert_parallel or ())
    refuse_ranks(tensor_parallel, False, {"expert_parallel": by_expert}, False, None)
    launched = tensor_parallel > 1 and not started_here
    # Ranks that each look at a clock would not make the same number of runs.
    clock = Clock(positive("--repeats", repeats), math.inf if launched else seconds)
    if not 0 < memory <= 1:
        raise OptionError(f"--memory is a share of the memory, above 0 and at most 1, not {memory}")
    positive("--max-batch-size", max_batch_size)
    longest = max(item.longest for item in work)
    if json is not None:
        _make_room(json)
    speaks = not launched or rank_of() == 0

    def tell(item: Measurement) -> None:
        if not speaks:
            return
        tqdm.write(row(item), file=sys.stdout)
        sys.stdout.flush()
        if json is not None:
            with json.open("a") as file:
                print(item.to_json(), file=file)

    results: list[Measurement] = []
    with one_job(tensor_parallel):
        if launched:
            place = place_of_rank(tensor_parallel, place, work)
        sources = [Source.of(name, place, kind) for name in models]
        for source in sources:
            limit = getattr(source.text, "max_position_embeddings", None)
            if limit and limit < longest:
                raise OptionError(
                    f"{source.name} takes {limit} tokens, prompt and answer; the work has up to {longest}"
                )
        facts = machine(place, tensor_parallel)
        speed = measure_rates(place, kind)
        if started_here and place.type == "cpu":
            speed = speed.shared(tensor_parallel)
        facts |= {"copy_GB_s": round(speed.copy / 1e9, 1), "matmul_TFLOP_s": round(speed.matmul / 1e12, 4)}
        if speaks:
            print(header(facts))
        for source in sources:
            most = min(max_batch_size, max(item.concurrency for item in work))
            schemes = (quantization, kv_cache)
            setup = Setup(source, most, longest, max_step_tokens, memory, *schemes, tensor_parallel, by_expert)
            if speaks:
                print(f"\n{source.name}, {setup.kind}\n{COLUMNS}", flush=True)
            results += run(Plan(setup, work, peers, clock, speed, facts, tell, Progress(speaks)))
    if speaks and any(item.who == OURS and (item.ms is None or not item.right) for item in results):
        print("fuseline: not everything was measured, or the tokens are wrong; see above", file=sys.stderr)
        raise typer.Exit(1)


def _make_room(file: Path) -> None:
    """See to it that a file can be written, before anything takes long. Raises OptionError if it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK) or file.is_dir():
            raise PermissionError("no permission to write it")
    except OSError as error:
        raise OptionError(f"{file}: {error}; name a file that can be written") from error
