"""The report of a compile: what was captured, what was fused, which kernels came of it, what was left alone."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch.fx import Node

from ..codegen.kernels import Kernel
from ..codegen.region import loose_nodes, regions_of
from ..ir.fold import Fold
from ..ir.graph import Graph
from ..ir.ops import op_name
from ..ir.period import fold_of, layer_of, repeats, window
from ..ir.unfold import Unfolded
from ..passes import PassReport
from .memory import MemoryPlan

# Operators that make no work: they only look at the same memory in another shape.
_VIEWS = frozenset(
    {"aten.reshape", "aten.unsqueeze", "aten.squeeze.dim", "getitem", "aten.expand", "aten.slice.Tensor"}
)


def _is_copied(node: Node) -> bool:
    """Whether a view is strided and read by a kernel, for which it is copied first."""
    if op_name(node.target) in ("getitem", "aten.reshape", "aten.unsqueeze", "aten.squeeze.dim"):
        return False
    return any(user.meta.get("region") is not None for user in node.users)


def kernels_by_layer(whole: Unfolded) -> dict[int, list[str]]:
    """The kernel regions of each layer by name, in order; a region is of the layer that its last value is named after."""
    ends = {view.nodes[-1]: view.region.name for view in regions_of(whole.folded)}
    found: dict[int, list[str]] = {}
    for nodes, times in whole.stages():
        places = [(layer_of(node.name), ends[node]) for node in nodes if node in ends]
        for turn in times:
            for layer, name in places:
                if layer >= 0:
                    found.setdefault(layer + turn * whole.step, []).append(name)
    return found


@dataclass
class Report:
    """Printed as a table (``str``) and as JSON (``as_json``)."""

    device: str
    dtype: str
    model: str = ""
    nodes: int = 0
    layers: int = 0
    attention: dict[str, int] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)
    distinct_kernels: int = 0
    kernel_calls: int = 0
    kernel_counts: dict[str, int] = field(default_factory=dict)
    other_operators: dict[str, int] = field(default_factory=dict)
    layer_kernels: dict[int, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    bytes_by_type: dict[str, int] = field(default_factory=dict)
    cache_tokens: int = 0
    cache_bytes: int = 0
    workspace_bytes: int = 0
    graph_bytes: int = 0
    planned_bytes: int = 0
    measured_bytes: int | None = None
    self_check: float = 0.0
    source_check: str = ""
    verification: str = ""
    calibration: str = ""
    checkpoint: str = ""
    model_plan: str = ""
    meetings: str = ""
    graphs: str = "off"
    tilings: dict[str, dict[str, object]] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that the block takes."""
        begin = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin

    def capture(self, graph: Graph) -> None:
        """Note what the captured graph holds; folded layers count as often as they stand for others."""
        kinds: Counter[str] = Counter()
        fold = fold_of(graph)
        repeated = set(window(graph, fold)) if fold else ()
        for node in graph.calls():
            count = 1 + repeats(fold) if fold and node in repeated else 1
            self.nodes += count
            if op_name(node.target) in ("nn.attention", "nn.paged_attention"):
                at = 5 if op_name(node.target) == "nn.attention" else 8
                kind = str(node.args[at]) if len(node.args) > at else "causal"
                kinds[f"{kind} {node.args[at + 1]}" if kind != "causal" else kind] += count
        self.layers = sum(kinds.values())
        self.attention = dict(kinds)

    def note_passes(self, entries: Sequence[PassReport], fold: Fold | None) -> None:
        """Note what the passes did; sites in folded layers are named for every layer that they stand for."""
        self.passes = [entry.spread(fold) if fold else entry for entry in entries]

    def kernels(self, whole: Unfolded, kernels: Sequence[Kernel]) -> None:
        """Note the kernels and the operators of a step that are in none."""
        self.distinct_kernels = len(kernels)
        self.kernel_calls = sum(len(kernel.regions) for kernel in kernels)
        self.kernel_counts = {kernel.name: len(kernel.regions) for kernel in kernels}
        self.layer_kernels = kernels_by_layer(whole)
        others: Counter[str] = Counter()
        loose = set(loose_nodes(whole.folded))
        for nodes, times in whole.stages():
            for node in nodes:
                if node in loose and (op_name(node.target) not in _VIEWS or _is_copied(node)):
                    others[op_name(node.target)] += len(times)
        self.other_operators = dict(others)

    def memory(self, plan: MemoryPlan, block_size: int) -> None:
        """Note what is planned to be held in memory."""
        self.bytes_by_type = dict(plan.by_type)
        self.weight_bytes, self.cache_bytes = plan.weights, plan.cache
        self.cache_tokens = plan.blocks * block_size
        self.workspace_bytes, self.planned_bytes = plan.workspace + plan.graphs, plan.total

    def fusions(self) -> dict[str, tuple[int, int]]:
        """``(fused, refused)`` by pass, repeated passes added up."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.passes:
            fused, refused = found.get(entry.name, (0, 0))
            found[entry.name] = (fused + len(entry.fused), refused + len(entry.refused))
        return found

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "captured": {"nodes": self.nodes, "layers": self.layers, "attention": self.attention},
            "passes": [entry.as_dict() for entry in self.passes],
            "kernels": {"distinct": self.distinct_kernels, "calls": self.kernel_calls, "regions": self.kernel_counts},
            "kernels_by_layer": {str(layer): names for layer, names in self.layer_kernels.items()},
            "other_operators": self.other_operators,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_by_type": self.bytes_by_type,
            "kv_cache": {"tokens": self.cache_tokens, "bytes": self.cache_bytes},
            "workspace_bytes": self.workspace_bytes,
            "planned_bytes": self.planned_bytes,
            "measured_bytes": self.measured_bytes,
            "self_check_relative_rmse": self.self_check,
            "source_check": self.source_check,
            "verification": self.verification,
            "calibration": self.calibration,
            "checkpoint": self.checkpoint,
            "model_plan": self.model_plan,
            "meetings": self.meetings,
            "graphs": self.graphs,
            "tilings": self.tilings,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def rows(self) -> list[tuple[str, str]]:
        """The short form: a few facts, each with its name."""
        fused = [f"{name} {done}" for name, (done, _) in self.fusions().items() if done and name not in _QUIET]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.attention.items())
        other = ", ".join(f"{name} x{count}" for name, count in self.other_operators.items()) or "none"
        return [
            ("model", f"{self.model}, {self.dtype} on {self.device}"),
            ("captured", f"{self.nodes} nodes, {self.layers} attention layers ({kinds})"),
            ("fused", ", ".join(fused) or "nothing"),
            *([("ranks", self.model_plan)] if self.model_plan else []),
            *([("meetings", self.meetings)] if self.meetings else []),
            ("kernels", f"{self.distinct_kernels} distinct, {self.kernel_calls} in a step"),
            ("other operators", other),
            ("weights", self._weights_text()),
            ("KV cache", f"{self.cache_tokens} tokens, {self.cache_bytes / 1e6:.0f} MB"),
            ("workspace", f"{self.workspace_bytes / 1e6:.0f} MB"),
            ("memory", self._memory_text()),
            ("graphs", self.graphs),
            ("tilings", f"of {len(self.tilings)} kernels measured" if self.tilings else "those of the files"),
            ("self-check", f"concatenated sequences agree to {self.self_check:.0e}"),
            *([("model itself", self.source_check)] if self.source_check else []),
            *([("checkpoint", self.checkpoint)] if self.checkpoint else []),
            *([("calibrated", self.calibration)] if self.calibration else []),
            ("verified", self.verification or "no"),
            ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())),
        ]

    def _weights_text(self) -> str:
        parts = [f"{name} {size / 1e6:.0f} MB" for name, size in self.bytes_by_type.items() if size]
        return f"{self.weight_bytes / 1e6:.0f} MB" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")

    def _memory_text(self) -> str:
        planned = f"{self.planned_bytes / 1e6:.0f} MB planned"
        return planned if self.measured_bytes is None else f"{planned}, {self.measured_bytes / 1e6:.0f} MB at most used"

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=120, color_system=None)
        console.print(two_columns(self.rows()))
        table = Table("", "pass", "found", "fused", "refused", "near", "ms", "first reason", box=None)
        for number, entry in enumerate(self.passes, start=1):
            first = (entry.refused or entry.near)[:1]
            why = f"{first[0].site}: {first[0].why}" if first else ""
            counts = (entry.found, len(entry.fused), len(entry.refused), len(entry.near), round(entry.milliseconds))
            table.add_row(f"{number:03d}", entry.name, *map(str, counts), why)
        console.print(table)
        kernels = Table("kernel", "regions", box=None)
        for name, count in self.kernel_counts.items():
            kernels.add_row(name, str(count))
        console.print(kernels)
        return buffer.getvalue()

    __repr__ = __str__


_QUIET = frozenset({"MergeDuplicates", "SinkTransposes", "DropBatchDim", "GroupKernels", "SelectRows", "Localize"})


def two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and facts."""
    table = Table(show_header=False, box=None)
    for name, fact in rows:
        table.add_row(name, fact)
    return table
