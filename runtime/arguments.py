"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A directory, a hub id, a .gguf file, or package:NAME for the one in a Python package."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on a GPU.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer; by default the model's own.")]
CacheDtype = Annotated[
    str | None, typer.Option("--kv-cache", metavar="TYPE", help="Hold keys and values in 8 bits: int8 or fp8.")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME", help="Hold weights in fewer bits: int8, int4, ..., or PATTERN=SCHEME,PATTERN=none,..."
    ),
]
ExpertParallel = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Ranks hold some of the experts of such weights, whole: '*.experts.*'."),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        metavar="N", help="Divide the model among so many ranks: those of mpirun or torchrun, or started here."
    ),
]
