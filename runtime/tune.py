"""Choose the tilings of a model's matmuls by measurement on its own weights, once for each GPU and kernel."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..codegen.exchange import MirrorExchange, sent_by
from ..codegen.kernels import Kernel
from ..codegen.launch import cache_directory, kernel_path, replace_file
from ..codegen.offline import load_kernel_file
from ..codegen.precompile import Compilers
from ..codegen.region import RegionView, regions_of
from ..codegen.tuning import ROWS, Choices, Timing, choose, measure, wanted
from ..ir.graph import flat_types, type_of
from ..ir.loop import Loop
from ..ir.placement import OPTION as TENSOR_PARALLEL
from ..ir.types import Dim
from .options import OptionError
from .parts import places_of
from .ranks import rank_of

Constants = Mapping[Node, Sequence[Tensor]]

TUNING_SECONDS = 40.0
"""How long a compile measures at most."""


@dataclass(frozen=True)
class Tuning:
    """What was measured for one kernel, and what follows from it. Written and read as JSON."""

    kernel: str
    machine: dict[str, str]
    choices: Choices
    timings: list[Timing]

    @staticmethod
    def read(path: Path) -> Tuning:
        """Raises ValueError, KeyError, TypeError or OSError if the file holds no record."""
        found = json.loads(path.read_text())
        return Tuning(
            found["kernel"],
            found["machine"],
            tuple((most, int(config)) for most, config in found["choices"]),
            [Timing(**item) for item in found["timings"]],
        )

    def write(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self), indent=1))


def machine_of(device: torch.device) -> dict[str, str]:
    """All that a measurement depends on, beside the kernel's own text."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "processors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def tune_kernels(
    kernels: Sequence[Kernel],
    loop: Loop,
    constants: Constants,
    device: torch.device,
    max_rows: int,
    until: float,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, Tuning]:
    """What is known of every kernel that has several tilings, by its name: from earlier compiles, else measured.

    Args:
        constants: the weights of the kernels' regions, by node and time. ``max_rows``: sequences in a decode step.
        until: a time of ``time.perf_counter``. After it, the kernels not measured yet keep the tilings of their files,
            and a kernel that was measured in part is not recorded.
    """
    machine = machine_of(device)
    rows_of = [rows for rows in ROWS if rows < 2 * max_rows]
    found: dict[str, Tuning] = {}
    fresh = []
    # The heaviest first: time is best spent on them.
    for kernel in sorted(kernels, key=lambda item: -_work(item)):
        module = load_kernel_file(kernel_path(kernel))
        if not hasattr(module, "CONFIGS"):
            continue
        key = hashlib.sha256(json.dumps([kernel.source, machine, rows_of]).encode()).hexdigest()[:16]
        record = cache_directory("tuning") / f"{kernel.name}_{key}.json"
        try:
            found[kernel.name] = Tuning.read(record)
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or one of another version: measure
            fresh.append((kernel, module, record))
    if not fresh or time.perf_counter() > until:
        return found
    views = {view.region: view for view in regions_of(loop.graph)}

    def sets_of(kernel: Kernel) -> _Sets:
        own = [views[region] for region in kernel.regions if region in views]
        return _Sets(own, constants, device, rows_of[-1])

    with ExitStack() as stack:
        ahead: dict[str, list[Future[bool]]] = {}
        if device.type == "cuda":
            ranks = loop.graph.options.get(TENSOR_PARALLEL, 1)
            exchange = MirrorExchange(places_of(loop), device) if ranks > 1 else None
            compilers = stack.enter_context(Compilers(ranks, bound=rank_of() is not None))
            for kernel, module, _ in fresh:
                sends = exchange if sent_by(kernel.graph) else None
                needed = wanted(module, sets_of(kernel), rows_of, sends)
                ahead[kernel.name] = [compilers.compile(item) for item in needed]
        for kernel, module, record in progress(fresh):
            wait(ahead.get(kernel.name, ()), until - time.perf_counter())
            if time.perf_counter() < until:
                tuning, complete = _measured(kernel, module, sets_of(kernel), rows_of, machine, until)
                found[kernel.name] = tuning
                if complete:
                    tuning.write(record)
    return found


def replayed(path: str | Path, kernels: Sequence[Kernel]) -> dict[str, Choices]:
    """The tilings that the ``report.json`` of an earlier compile lists, by the kernel's name.

    Raises:
        OptionError: there is no such report, or it is of kernels with another text.
    """
    try:
        listed = json.loads(Path(path).read_text())["tilings"]
        found = {name: (item["source"], item["choices"]) for name, item in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"tuning={str(path)!r} is no report.json of a dump: {error}") from error
    sources = {kernel.name: digest_of(kernel) for kernel in kernels}
    for name, (source, _) in found.items():
        if sources.get(name) != source:
            raise OptionError(
                f"tuning={str(path)!r}: {name} is not the kernel that was measured: its text has changed; measure anew"
            )
    return {name: tuple((most, int(config)) for most, config in pairs) for name, (_, pairs) in found.items()}


def listed(choices: Mapping[str, Choices], kernels: Sequence[Kernel]) -> dict[str, dict[str, object]]:
    """Tilings as a report lists them, to be replayed."""
    sources = {kernel.name: digest_of(kernel) for kernel in kernels}
    return {
        name: {"source": sources[name], "choices": [list(pair) for pair in pairs]} for name, pairs in choices.items()
    }


def digest_of(kernel: Kernel) -> str:
    return hashlib.sha256(kernel.source.encode()).hexdigest()[:16]


def _measured(
    kernel: Kernel, module: ModuleType, sets: _Sets, rows_of: Sequence[int], machine: dict[str, str], until: float
) -> tuple[Tuning, bool]:
    timings: list[Timing] = []
    complete = True
    for timing in measure(module, sets, rows_of):
        timings.append(timing)
        if time.perf_counter() > until:
            complete = False
            break
    return Tuning(kernel.name, machine, choose(module, timings), timings), complete


class _Sets:
    """Arguments for the launches of a kernel: the weights of several layers, and random rows."""

    def __init__(self, views: Sequence[RegionView], constants: Constants, device: torch.device, rows: int) -> None:
        weights = [[constants[node] for node in view.inputs if node in constants] for view in views]
        size = sum(items[0].nbytes for items in weights[0])
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        enough = 1 + 3 * cache // max(1, size)
        self._kinds = [type_of(node) for node in views[0].inputs] + [
            type_of(node) for node in views[0].outputs if node not in views[0].in_place
        ]
        self._sets: list[list[Tensor]] = []
        for view, values in zip(views, weights):
            for turn in range(max(map(len, values), default=1)):
                if len(self._sets) < enough:
                    self._sets.append(self._arguments(view, constants, turn, rows, device))

    def __call__(self, rows: int) -> list[list[Tensor]]:
        return [
            [value[:rows] if kind.shape and isinstance(kind.shape[0], Dim) else value for kind, value in pairs]
            for values in self._sets
            for pairs in [list(zip(self._kinds, values))]
        ]

    @staticmethod
    def _arguments(view: RegionView, constants: Constants, turn: int, rows: int, device: torch.device) -> list[Tensor]:
        values = []
        results = [node for node in view.outputs if node not in view.in_place]
        for node in [*view.inputs, *results]:
            held = constants.get(node)
            values.append(held[turn % len(held)] if held else _random(node, rows, device))
        return values


def _random(node: Node, rows: int, device: torch.device) -> Tensor:
    """Values for an argument of so many rows; a cache has as many slots, and indices name each row once."""
    kind = flat_types(node.meta["type"])[0]
    shape = [size if isinstance(size, int) else rows for size in kind.shape]
    if kind.torch_dtype.is_floating_point:
        return torch.randn(shape, device=device, dtype=torch.float32).to(kind.torch_dtype)
    count = shape[0] if shape else 1
    values = torch.arange(count, device=device).reshape([count, *([1] * (len(shape) - 1))]).to(kind.torch_dtype)
    return values.expand(shape).contiguous() if shape else values[0]


def _work(kernel: Kernel) -> int:
    """Weights that one launch reads."""
    total = 0
    for node in kernel.graph.inputs():
        size = 1
        for part in type_of(node).shape:
            size *= part if isinstance(part, int) else 1
        total += size
    return total
