"""Run a model over calibration windows, operator by operator, and round each weight when its rows are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ...ir.graph import is_constant, type_of
from ...ir.interpret import bind_dims, call, read
from ...ir.loop import Loop
from ...ir.ops import PROJECTIONS, op_name
from ...ir.quantized import dequantize, is_quantised, quantize
from ...ir.schemes import Scheme, scheme_of
from ...ir.types import TensorType
from ..constants import origin_of, weight_on
from ..liveness import last_uses
from ..selfcheck import step_of
from .attended import ahead, values_of
from .balance import balance
from .makers import maker_of
from .rounding import Inputs, rounded
from .smoothing import smoothing

# Rows of logits that are computed: the output projection may be rounded, too.
_ROWS = 512


@dataclass(frozen=True)
class Calibrated:
    """``values`` are rounded weights, the vectors that ``smoothed`` of them were multiplied with before, and ``scales``, the
    weights of norms that were divided to balance inputs: by what they are computed from, as ``fold_constants`` takes them
    (``scales`` by their names as well). ``error`` is the squared error of all projections' results over that of rounding
    to nearest."""

    values: dict[str, Tensor]
    scales: dict[str, Tensor]
    smoothed: int
    error: float

    @property
    def summary(self) -> str:
        """What came of it, for a report."""
        count = len(self.values) - self.smoothed - len(self.scales)
        smoothed = f", {self.smoothed} of them smoothed" if self.smoothed else ""
        return f"{count} weights by GPTQ{smoothed}: {self.error:.0%} of the squared error of rounding to nearest"


def calibrate(
    loop: Loop,
    weights: Mapping[str, Tensor],
    windows: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Calibrated:
    """Round the weights that a graph rounds, in the order in which the model uses them, and smooth rows where it says so.

    All windows go through each operator before the next one, and what follows a projection reads what its rounded
    weight gives: later weights make up for errors of earlier ones. One layer's weights are on the device at a time.
    """
    return _Calibration(loop, weights, windows, block_size, device).run(progress)


class _Calibration:
    def __init__(
        self,
        loop: Loop,
        weights: Mapping[str, Tensor],
        windows: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> None:
        step = step_of(windows, block_size, device)
        tokens = len(step.tokens)
        self._starts = step.query_starts.tolist()
        self._step = replace(step, rows=torch.linspace(0, tokens - 1, min(_ROWS, tokens), device=device).long())
        self._slots = int(step.slots.max()) // block_size * block_size + block_size
        self._loop, self._weights, self._device = loop, weights, device
        self._dims = bind_dims(loop.graph, {node.name: getattr(self._step, node.name) for node in loop.graph.inputs()})
        self._values: dict[Node, Any] = {}
        self._origins: dict[Node, str] = {}
        self._caches: dict[tuple[str, TensorType], Tensor] = {}
        self._made: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._names: dict[Node, str] = {}
        weights_read = [(node, time) for stage in loop.stages for time in stage.times for node in stage.nodes]
        self._readers = Counter(loop.weight(*item) for item in weights_read if str(item[0].target) == "weight")
        self._smoothed = 0
        self._errors = [0.0, 0.0]

    def run(self, progress: Callable[[list[Any]], Iterable[Any]]) -> Calibrated:
        expiring = last_uses(self._loop, {})
        work = [
            (stage, node, time, node is stage.nodes[-1])
            for stage in self._loop.stages
            for time in stage.times
            for node in stage.nodes
        ]
        handed: dict[Node, tuple[Any, str]] = {}
        with torch.inference_mode():
            for _, node, time, last in progress(work):
                if node.op == "output":
                    continue
                if node in self._loop.carries:
                    source = node.args[0]
                    assert isinstance(source, Node)
                    found = handed[node] if time else (self._values[source], self._origins.get(source, ""))
                    self._values[node], self._origins[node] = found
                else:
                    self._values[node] = self._value(node, time)
                for item in expiring.get(node, ()):
                    if not is_constant(item):
                        self._values.pop(item, None)
                if last:
                    handed = {
                        carry: (self._values.get(later), self._origins.get(later, ""))
                        for carry, later in self._loop.carries.items()
                    }
        ours, plain = self._errors
        return Calibrated(self._made, self._scales, self._smoothed, ours / plain if plain else 1.0)

    def _value(self, node: Node, time: int) -> Any:
        name = op_name(node.target)
        if node.op == "placeholder":
            return getattr(self._step, node.name)
        if name == "weight":
            self._origins[node], self._names[node] = self._loop.origin(node, time), self._loop.weight(node, time)
            return weight_on(self._weights, self._loop.weight(node, time), type_of(node), self._device)
        if name == "cache":
            # No layer reads what another has written.
            kind = type_of(node)
            key = str(node.args[0]), kind
            if key not in self._caches:
                shape = kind.concrete({"C": self._slots})
                self._caches[key] = torch.empty(shape, dtype=kind.torch_dtype, device=self._device)
            return self._caches[key]
        if is_constant(node):
            self._origins[node] = origin_of(node, self._origins)
            if name in ("nn.quantize", "nn.smoothing") or any(
                self._values[item] is None for item in node.all_input_nodes
            ):
                return None  # until it is known what it is multiplied with
        elif name in PROJECTIONS or name == "nn.grouped_linear":
            self._round(node, time)
        elif name == "nn.quantize" and len(node.args) > 3:
            self._smooth(node)
        return self._called(node, self._values)

    def _called(self, node: Node, values: Mapping[Node, Any]) -> Any:
        return call(node, lambda item: read(item, values, self._dims), self._device)

    def _smooth(self, rounding: Node) -> None:
        """Find what the rows of a projection are divided by, and multiply its weight with it."""
        rows, vector = rounding.args[0], rounding.args[3]
        assert isinstance(rows, Node) and isinstance(vector, Node)
        if self._values[vector] is None:
            origin, scheme = self._origins[vector], scheme_of(type_of(rounding).dtype)
            assert scheme is not None
            if origin not in self._made:
                flat, matrix = self._values[rows].flatten(0, -2), self._values[vector.args[0]]  # type: ignore[index]
                self._made[origin] = smoothing(flat, matrix, scheme)
                self._smoothed += 1
            self._values[vector] = self._made[origin]
            for user in filter(is_constant, vector.users):
                self._values[user] = self._called(user, self._values)

    def _round(self, projection: Node, time: int) -> None:
        """Round the weight of a projection, if it is to be; that of experts, each by the rows that are sent to it."""
        grouped = op_name(projection.target) == "nn.grouped_linear"
        x, weight = projection.args[0], projection.args[1 + grouped]
        assert isinstance(x, Node) and isinstance(weight, Node)
        if self._values.get(weight) is not None or op_name(weight.target) != "nn.quantize":
            return
        matrix, scheme = self._values[weight.args[0]], scheme_of(str(weight.args[1]))  # type: ignore[index]
        assert scheme is not None
        rows = dequantize(self._values[x], type_of(x), torch.float32) if is_quantised(x) else self._values[x].float()
        if grouped:
            ids = self._values[projection.args[1]]  # type: ignore[index]
            sent = rows if rows.dim() == 3 else rows.unsqueeze(1).expand(-1, ids.shape[1], -1)
            tries = int(str(weight.args[2])) if len(weight.args) > 2 else 1
            parts = [self._expert(item, sent[ids == expert], scheme, tries) for expert, item in enumerate(matrix)]
            made = torch.stack(parts)
        else:
            made = self._projected(projection, matrix, rows, scheme, time)
        self._values[weight] = self._made[self._origins[weight]] = made

    def _expert(self, matrix: Tensor, rows: Tensor, scheme: Scheme, tries: int) -> Tensor:
        """An expert's matrix. Rounding by fewer rows than it has inputs makes products with other rows worse."""
        if len(rows) < matrix.shape[1]:
            return quantize(matrix, scheme, tries)
        hessian = rows.t() @ rows
        made = rounded(matrix, Inputs.of(hessian), scheme)
        self._compare(made, matrix, hessian, scheme)
        return made

    def _projected(self, projection: Node, matrix: Tensor, rows: Tensor, scheme: Scheme, time: int) -> Tensor:
        """A projection's matrix, its inputs balanced before; rows that make values are rounded by what is read of them."""
        attended = self._attended(projection, matrix, rows, time)
        flat = rows.flatten(0, -2)  # some models have [T, 1, K] here
        hessian = flat.t() @ flat
        inputs = Inputs.of(hessian)
        vector = self._balanced(projection, matrix, inputs, scheme)
        wide = matrix.float() * vector
        made = rounded(wide, inputs.divided(vector), scheme)
        if attended is not None:
            part, means = attended
            made[part] = rounded(wide[part], Inputs.of(means).divided(vector), scheme)
        self._compare(made, matrix, hessian, scheme, vector)
        return made

    def _compare(
        self, made: Tensor, matrix: Tensor, hessian: Tensor, scheme: Scheme, vector: Tensor | float = 1.0
    ) -> None:
        """Add up the squared errors of what a matrix makes, and of what it would make if it were rounded to nearest."""
        kind = TensorType(scheme.name, tuple(matrix.shape))
        for place, (found, over) in enumerate(((made, vector), (quantize(matrix, scheme), 1.0))):
            wrong = dequantize(found, kind, torch.float32) / over - matrix.float()
            self._errors[place] += float(((wrong @ hessian) * wrong).sum())

    def _attended(self, projection: Node, matrix: Tensor, rows: Tensor, time: int) -> tuple[slice, Tensor] | None:
        """Which rows of a projection's matrix make values, if some do, and the Hessian of the means of their inputs."""
        values = values_of(projection)
        if values is None or rows.dim() != 2:
            return None
        known: dict[Node, Any] = {}

        def found(node: Node) -> Any:
            return ahead(node, known, self._values, lambda item: self._value(item, time), self._called)

        bias = projection.args[2] if len(projection.args) > 2 else None
        added = found(bias).float() if isinstance(bias, Node) else None
        known[projection] = F.linear(rows, matrix.float(), added).to(type_of(projection).torch_dtype)
        written = self._values.get(values.keys)
        keys = found(values.keys.args[1]) if written is None else written[self._step.slots]  # type: ignore[arg-type]
        queries = found(values.queries)
        if queries is None or keys is None:
            return None
        sinks = None if values.sinks is None else found(values.sinks)
        return slice(values.begin, values.end), values.hessian(rows, queries, keys, sinks, self._starts)

    def _balanced(self, projection: Node, matrix: Tensor, inputs: Inputs, scheme: Scheme) -> Tensor:
        """Divide the inputs of a projection where that costs steps nothing; its matrix is to be multiplied with the result.

        Where rows are rounded they have a vector of their own (``smoothing``), and E4M3 is about as exact at any size.
        """
        maker = None if scheme.dynamic else maker_of(projection)
        if maker is None or any(self._readers[name] > 1 for name in self._leaves(maker.weight, projection)):
            return torch.ones(matrix.shape[1], device=self._device)
        source, x, channels = maker.weight, projection.args[0], maker.channels.to(self._device)
        assert isinstance(x, Node)
        value, inner = self._values[source], self._values[x]
        vector = maker.exact(value, balance(matrix, inputs.shares, scheme, channels))
        made = self._values[source] = self._made[self._origins[source]] = maker.divided(value, vector)
        if not is_quantised(source):
            self._scales[self._names[source]] = made
        self._values[x] = (inner.float() / vector[channels]).to(inner.dtype)
        return vector[channels]

    def _leaves(self, *weights: Any) -> Iterator[str]:
        """The names of the weights that nodes are computed from, through constants alone; of projections, their own."""
        for node in weights:
            node = node if is_constant(node) else node.args[1]
            if node in self._names:
                yield self._names[node]
            yield from self._leaves(*node.all_input_nodes)
