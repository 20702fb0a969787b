"""Ranks on the GPUs of one machine: the sum over ranks by itself, and decode steps and prompts of a shape.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/gpu_ranks.py sum
    mpirun -n 2 python -m mpi4py benchmarks/gpu_ranks.py steps llama-2-7b

``sum``: microseconds of the kernel that adds up rows over the ranks, adds the residual and takes the norm, in a CUDA graph, by
rows and width; of the same through NCCL; and of torch's own one-shot sum alone. ``steps``: a JSON line of milliseconds as
``gpu_schemes.py`` prints it. The first rank prints; weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_schemes import compiled_for, times_of
from transformers import AutoModelForCausalLM

from fuseline import ir
from fuseline.codegen.exchange import places_for
from fuseline.codegen.kernels import Kernel, kernel_file
from fuseline.codegen.launch import load_launch
from fuseline.runtime.bench.random_weights import RandomWeights
from fuseline.runtime.bench.shapes import shape_config
from fuseline.runtime.join import gpu_of_rank, torch_group
from fuseline.runtime.nccl import NCCLGroup
from fuseline.runtime.ranks import rank_of, size_of

REGION = """\
def all_reduce(x: bf16[T, {width}], residual: bf16[T, {width}], *, T: dim(1, 8192)):
    reduced: bf16[T, {width}] = dist.all_reduce(x, {ranks})
    add: bf16[T, {width}] = aten.add.Tensor(residual, reduced)
    norm: bf16[T, {width}] = nn.rms_norm(add, None, 1e-05)
    return [add, norm]
"""


def replayed_us(work: Callable[[], Any], begin: Callable[[], None] = lambda: None, launches: int = 50) -> float:
    """Median microseconds of ``work`` in a CUDA graph of many."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        begin()
        for _ in range(launches):
            work()
    times = []
    for _ in range(12):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(1e3 * before.elapsed_time(after) / launches)
    return statistics.median(times[2:])


def time_sums(group: NCCLGroup, width: int, rows: int) -> dict[str, Any]:
    graph = ir.parse(REGION.format(width=width, ranks=group.size))
    exchange = group.connect(places_for(graph, 64))
    launch = load_launch(Kernel(graph.name, kernel_file(graph), graph), exchange=exchange)
    generator = torch.Generator(group.device).manual_seed(group.rank)
    x = torch.randn(rows, width, device=group.device, generator=generator).bfloat16()
    residual = torch.full_like(x, 0.25)
    total, norm = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    wanted = sum(part.double() for part in group.all_gather(x)) + residual.double()
    exchange.limit = 1 << 40
    launch(x, residual, total, norm)
    error = (total.double() - wanted).norm() / wanted.norm()
    scaled = wanted / (wanted.square().mean(1, keepdim=True) + 1e-5).sqrt()
    off = (norm.double() - scaled).norm() / scaled.norm()
    found: dict[str, Any] = {"width": width, "rows": rows, "error": f"{error:.1e} {off:.1e}", "why": exchange.why}
    if exchange.why == "":
        found["kernel_us"] = round(replayed_us(lambda: launch(x, residual, total, norm), exchange.begin), 2)
    exchange.limit = -1
    found["nccl_us"] = round(replayed_us(lambda: launch(x.clone(), residual, total, norm)), 2)
    try:
        import torch.distributed as distributed
        import torch.distributed._symmetric_memory as symmetric

        shared = symmetric.empty(rows, width, dtype=torch.bfloat16, device=group.device)
        symmetric.rendezvous(shared, distributed.group.WORLD)
        name = distributed.group.WORLD.group_name
        found["torch_one_shot_us"] = round(
            replayed_us(lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)), 2
        )
    except (RuntimeError, AttributeError) as error:
        found["torch_one_shot_us"] = str(error).partition("\n")[0]
    return found


def time_steps(shape: str, scheme: str, ranks: int) -> dict[str, Any]:
    config = shape_config(shape)
    device = gpu_of_rank() if ranks > 1 else torch.device("cuda", 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    begin = time.perf_counter()
    compiled = compiled_for(model, scheme, weights=RandomWeights(model, device), tensor_parallel=ranks)
    found: dict[str, Any] = {"shape": shape, "scheme": scheme, "ranks": ranks}
    found["compile_s"] = round(time.perf_counter() - begin, 1)
    found["weights_GB"] = round(compiled.report.weight_bytes / 1e9, 2)
    return found | times_of(compiled, config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sum", "steps"))
    parser.add_argument("shape", nargs="?", default="llama-2-7b")
    parser.add_argument("schemes", nargs="*", default=["none"])
    options = parser.parse_args()
    ranks = size_of() or 1

    def tell(found: dict[str, Any]) -> None:
        if not rank_of():
            print(json.dumps(found), flush=True)

    tell({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": ranks})
    if options.what == "sum":
        group = torch_group(ranks, gpu_of_rank())
        assert isinstance(group, NCCLGroup)
        for width in (4096, 8192):
            for rows in (1, 8, 64, 256):
                tell(time_sums(group, width, rows))
    else:
        for scheme in options.schemes:
            tell(time_steps(options.shape, scheme, ranks))


if __name__ == "__main__":
    main()
