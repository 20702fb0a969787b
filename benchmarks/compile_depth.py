"""How compiling grows with depth: the same model of small width with 4 and with 80 layers, on the CPU.

    python benchmarks/compile_depth.py [llama qwen3_moe ...]

``export`` is the time within torch.export, ``model`` what running the model takes (its own forward and the self-check,
which go through every layer), ``rest`` everything else.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from deep import make_deep

import fuseline
from fuseline.ir import export


def main() -> None:
    names = sys.argv[1:] or ["llama", "qwen3_moe"]
    spent = [0.0]
    plain = torch.export.export

    def timed(*args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        try:
            return plain(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            spent[0] += time.perf_counter() - begin

    export.torch.export.export = timed  # type: ignore[assignment]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':20}{'total':>9}{'export':>9}{'model':>9}{'rest':>9}{'kernels':>9}")
    for name in names:
        for layers in (4, 4, 80):  # the first run imports and warms up
            model = make_deep(name, layers)
            spent[0], begin = 0.0, time.perf_counter()
            cache = fuseline.KVCacheConfig(max_tokens=256)
            compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache)
            total = time.perf_counter() - begin
            running = compiled.report.seconds["run the model itself"] + compiled.report.seconds["self-check"]
            cells = (total, spent[0], running, total - spent[0] - running)
            row = "".join(f"{cell:9.2f}" for cell in cells)
            print(f"{name + ', ' + str(layers) + ' layers':20}{row}{compiled.report.distinct_kernels:9}", flush=True)


if __name__ == "__main__":
    main()
