"""How compiling grows with depth: the same model of small width with 4 and with 80 layers, on the CPU.

    python benchmarks/compile_depth.py [llama qwen3_moe ...]

Seconds before, in and after torch.export; and how much of the time after it goes into running the model, which cannot
but grow with depth: its own forward as the yardstick, and the self-check of what was compiled.
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from deep import make_deep

import fuseline


class Stopwatch:
    """Notes when torch.export begins and ends."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._plain = torch.export.export
        torch.export.export = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        try:
            return self._plain(*args, **kwargs)
        finally:
            self.times.append(time.perf_counter())


def main() -> None:
    names = sys.argv[1:] or ["llama", "qwen3_moe"]
    watch = Stopwatch()
    print(f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        "".ljust(22)
        + "".join(title.rjust(10) for title in ("total", "before", "export", "after", "running", "kernels"))
    )
    for name in names:
        for layers in (4, 4, 80):  # the first run imports and warms up
            model = make_deep(name, layers)
            cache = fuseline.KVCacheConfig(max_tokens=256)
            watch.times, begin = [], time.perf_counter()
            compiled = fuseline.compile(model, device="cpu", max_seq_len=64, kv_cache=cache)
            end = time.perf_counter()
            first, last = watch.times[0], watch.times[-1]
            running = compiled.report.seconds["run the model itself"] + compiled.report.seconds["self-check"]
            cells = (end - begin, first - begin, last - first, end - last, running)
            row = "".join(f"{cell:10.2f}" for cell in cells) + str(compiled.report.distinct_kernels).rjust(10)
            print(f"{name}, {layers} layers".ljust(22) + row, flush=True)


if __name__ == "__main__":
    main()
