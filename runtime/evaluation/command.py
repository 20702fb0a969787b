"""``fuseline eval``: reads the options, compiles the model once for each scheme, and prints a table."""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from ..arguments import Device, Dtype, Model
from ..calibration.texts import Calibration
from ..compile import compile
from ..compiled import CompiledModel
from ..models import resolve, tokenizer_of
from ..options import KVCacheConfig, OptionError, positive, quantization_of, resolve_quantization
from ..progress import Progress, quiet_transformers
from .quality import Quality, compare, predictions, windows

_REPEATS = 10
_HEAD = f"{'weights':<24}{'bytes a weight':>15}{'perplexity':>12}{'over none':>11}{'mean KL':>10}{'top-1':>8}{'tokens/s':>10}"


@dataclass(frozen=True)
class Case:
    """A way to compile the model: its weights, and its KV cache."""

    name: str
    quantization: str | dict[str, str | None] | None = None
    kv_cache: str | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table. ``bytes_per_weight`` counts all weights, those left as they are among them.

    ``tokens_per_second``: decode steps of one sequence, with as many tokens behind it as a window has.
    """

    scheme: str
    bytes_per_weight: float
    quality: Quality
    over: float
    tokens_per_second: float

    def __str__(self) -> str:
        found = self.quality
        return (
            f"{self.scheme:<24}{self.bytes_per_weight:>15.3f}{found.perplexity:>12.3f}{self.over:>+11.2%}"
            f"{found.divergence:>10.5f}{found.agreement:>8.2%}{self.tokens_per_second:>10.1f}"
        )


def evaluate(
    model: Model,
    quantization: Annotated[
        str,
        typer.Option(
            metavar="SCHEME...", help="Schemes to compare, with spaces between: int8 int4g64 '*.down_proj=int8,*=int4'."
        ),
    ] = "int8 int4g128 int4g64 int4g32",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Add a row for each scheme with weights rounded by GPTQ.")
    ] = False,
    kv_cache: Annotated[
        str,
        typer.Option(
            metavar="TYPE...", help="Element types of the KV cache to compare, with spaces between: int8 fp8."
        ),
    ] = "",
    text: Annotated[Path | None, typer.Option(help="A text file; by default help texts of Python's library.")] = None,
    count: Annotated[int, typer.Option(help="Windows of the text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window, at least 2.")] = 1024,
    device: Device = None,
    dtype: Dtype = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Append a line of JSON for each scheme.")
    ] = None,
) -> None:
    """Say what quantization costs: perplexity, KL and top-1 agreement on a text beside the unquantised model.

    The reference's predictions are kept meanwhile: 4 bytes a token of the text and of the vocabulary.
    """
    quiet_transformers()
    positive("--count", count)
    if length < 2:
        raise OptionError(f"--length is at least 2, not {length}: a token is predicted from those before it")
    schemes = quantization.split()
    for scheme in schemes:
        resolve_quantization(quantization_of(scheme))
    path = resolve(model)
    texts = windows(_tokens(path, text), count, length)
    print(_HEAD, flush=True)
    cases = [Case("none"), *(Case(scheme, quantization_of(scheme)) for scheme in schemes)]
    if calibrate:
        cases += [replace(case, name=f"{case.name}, GPTQ", calibration=Calibration()) for case in cases[1:]]
    cases += [Case(f"KV cache in {kind}", kv_cache=kind) for kind in kv_cache.split()]
    for row in _rows(path, cases, texts, device, dtype):
        print(row, flush=True)
        if json_file is not None:
            with json_file.open("a") as file:
                print(json.dumps({"model": model, **asdict(row)}), file=file)


def _rows(path: str, cases: list[Case], texts: list[list[int]], device: str | None, dtype: str | None) -> Iterator[Row]:
    """A row for each case, the first the model as it is. No two compiled models are kept at a time."""
    reference: list[Tensor] = []
    weights, plain = 0, 0.0
    for case in cases:
        compiled = _compiled(path, case, len(texts[0]), device, dtype)
        made = predictions(partial(_logits, compiled), Progress(True).bar(texts, case.name))
        if not reference:
            reference = list(made)
            found = compare(reference, reference, texts)
            # Nearly all weights have the element type of the model.
            weights, plain = compiled.report.weight_bytes // compiled.options.dtype.itemsize, found.perplexity
        else:
            found = compare(made, reference, texts)
        speed = 1e3 / compiled.decode_step_ms(1, len(texts[0]), _REPEATS)
        yield Row(case.name, compiled.report.weight_bytes / weights, found, found.perplexity / plain - 1, speed)
        del compiled, made


def _compiled(path: str, case: Case, length: int, device: str | None, dtype: str | None) -> CompiledModel:
    return compile(
        path,
        device=device,
        dtype=dtype,
        max_batch_size=1,
        max_seq_len=length,
        kv_cache=KVCacheConfig(max_tokens=2 * length, dtype=case.kv_cache),
        quantization=case.quantization,
        calibration=case.calibration,
        progress=True,
    )


def _logits(compiled: CompiledModel, window: Sequence[int]) -> Tensor:
    return compiled([window]).logits[0]


def _tokens(path: str, text: Path | None) -> list[int]:
    tokenizer = tokenizer_of(path)
    try:
        words = text.read_text() if text else "\n".join(pydoc_data.topics.topics.values())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text {text}: {error}") from error
    print(f"text: {text or 'pydoc_data.topics'}", file=sys.stderr)
    return list(tokenizer(words)["input_ids"])
