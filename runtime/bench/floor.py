"""The floor: what a step must move or multiply at least, and how fast this machine can do that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...ir.graph import Graph, is_constant, type_of
from ...ir.ops import LOOKUPS, PROJECTIONS, op_name
from ...ir.types import Dim


@dataclass(frozen=True)
class Rates:
    """What the machine does: ``copy``, bytes a second (read and written); ``matmul``, operations a second; both large."""

    copy: float
    matmul: float

    def shared(self, ranks: int) -> Rates:
        """What each of several ranks on one machine has of them while all are at work."""
        return Rates(self.copy / ranks, self.matmul / ranks)


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Rates:
    """Copy and multiply something large for about ``seconds`` each; medians."""
    return Rates(_copy_rate(device, seconds), _matmul_rate(device, dtype, seconds))


def _copy_rate(device: torch.device, seconds: float) -> float:
    source = torch.ones(1 << (31 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_time(lambda: target.copy_(source), device, seconds)


def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / _median_time(lambda: left @ right, device, seconds))


def _median_time(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one run, among several in a row."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - begin) / count

    timed(2)
    count = max(1, int(seconds / 5 / timed(1)))
    return statistics.median(timed(count) for _ in range(5))


def decode_bytes(graph: Graph, batch: int, context: int) -> float:
    """Bytes that a decode step must read: its weights once, and the keys and values that its sequences see.

    Of an embedding only the rows looked up count. Of experts, those that a batch reaches if each token chooses evenly.

    Args:
        graph: the lowered graph; that of a rank gives what the rank must read.
        context: tokens of each sequence, the one of this step included.
    """
    total = 0.0
    for node, share in _read_weights(graph, batch).items():
        total += share * _bytes(node)
    for node in graph.calls():
        if op_name(node.target) == "nn.paged_attention":
            _, keys, values, *_ = node.args
            total += batch * _seen(node, context) * (_row_bytes(keys) + _row_bytes(values))
    return total


def prefill_operations(graph: Graph, batch: int, prompt: int) -> float:
    """Multiplications and additions of the matmuls and of causal attention for ``batch`` prompts of ``prompt`` tokens."""
    sizes, total = {"T": batch * prompt, "R": batch}, 0.0
    for node in graph.calls():
        name = op_name(node.target)
        if name in PROJECTIONS or name == "nn.grouped_linear":
            share = _experts_here(node) if name == "nn.grouped_linear" else 1.0
            total += 2.0 * share * _numel(node, sizes) * _numel(node.args[0], sizes, last=True)
        elif name == "nn.paged_attention":
            queries = sum(_seen(node, place) for place in range(1, prompt + 1))
            heads, width = type_of(node.args[0]).shape[1:]  # type: ignore[arg-type]
            out = type_of(node).shape[-1]
            assert isinstance(heads, int) and isinstance(width, int) and isinstance(out, int)
            total += 2.0 * batch * queries * heads * (width + out)
    return total


def _read_weights(graph: Graph, rows: int) -> dict[Node, float]:
    """The constants that a step reads, each tensor once, with the share of it that ``rows`` tokens need."""
    shares: dict[str, float] = {}
    nodes: dict[str, Node] = {}
    for node in graph.calls():
        if not is_constant(node):
            continue
        for user in node.users:
            if is_constant(user) or user.op == "output":
                continue
            # A tied weight may stand in the graph twice.
            key = str(node.args[0]) if str(node.target) == "weight" else node.name
            nodes[key] = node
            shares[key] = max(shares.get(key, 0.0), _share(node, user, rows))
    return {nodes[key]: share for key, share in shares.items()}


def _share(node: Node, user: Node, rows: int) -> float:
    first = type_of(node).shape[0] if type_of(node).shape else 1
    name = op_name(user.target)
    if not isinstance(first, int):
        return 1.0
    if name in LOOKUPS and user.args[0] is node:
        return min(1.0, rows / first)
    if name == "nn.grouped_linear" and node in user.args[2:]:
        chosen = type_of(user.args[1]).shape[1]  # type: ignore[arg-type]
        assert isinstance(chosen, int)
        return 1.0 - (1.0 - chosen * _experts_here(user) / first) ** rows
    return 1.0


def _experts_here(node: Node) -> float:
    """The share of the experts that this rank has; that of a full rank, where some of another are padding."""
    weight, experts = node.args[2], node.args[5] if len(node.args) > 5 else None
    assert isinstance(weight, Node)
    here = type_of(weight).shape[0]
    return here / experts if isinstance(here, int) and isinstance(experts, int) else 1.0


def _seen(attention: Node, context: int) -> int:
    """Keys that the last of ``context`` tokens sees."""
    window = attention.args[9] if len(attention.args) > 9 else 0
    return min(context, window) if isinstance(window, int) and window else context


def _numel(node: object, sizes: dict[str, int], last: bool = False) -> int:
    assert isinstance(node, Node)
    shape = type_of(node).shape
    total = 1
    for size in shape[-1:] if last else shape:
        total *= size.substitute(sizes) if isinstance(size, Dim) else size
    return total


def _bytes(node: Node) -> int:
    return type_of(node).nbytes({})


def _row_bytes(cache: object) -> int:
    assert isinstance(cache, Node)
    return _numel(cache, {"C": 1}) * type_of(cache).torch_dtype.itemsize
