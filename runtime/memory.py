"""How much memory a compiled model takes, known before its weights are placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, device
from torch.fx import Node

from ..codegen.region import RegionView, regions_of
from ..codegen.tuning import LIBRARY_ROWS
from ..ir.graph import Region, flat_types, is_constant, type_of
from ..ir.loop import Loop
from ..ir.ops import PROJECTIONS, op_name
from ..ir.placement import VOCABULARY
from ..ir.schemes import scheme_of
from ..ir.weights import LazyWeights, known_of
from .caches import cache_bytes_per_token
from .constants import read_in_parts
from .liveness import last_uses, overwritten
from .options import OptionError
from .sampler import DRAW_BYTES, draw_rows

# Operators whose result lies in the memory of their first argument.
_ALIASES = frozenset({"aten.reshape", "aten.unsqueeze", "aten.squeeze.dim", "aten.slice.Tensor", "aten.expand"})
# Of those, the ones whose result a kernel does not take as it is.
_STRIDED = frozenset({"aten.slice.Tensor", "aten.expand"})

# What matrix libraries keep for themselves on a GPU.
_LIBRARIES = 32 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device.

    by_type    what steps read, by element type; ``shared`` bytes of it are the given model's own
    placing    most that is taken while weights are merged
    cache      ``blocks`` blocks of the KV cache for sequences, and one more that padding uses
    workspace  most that a step takes for what it computes on the way, and sampling
    graphs     what CUDA graphs keep to themselves, and the logits they leave
    """

    by_type: Mapping[str, int]
    shared: int
    placing: int
    blocks: int
    block_bytes: int
    workspace: int
    graphs: int

    @property
    def weights(self) -> int:
        return sum(self.by_type.values())

    @property
    def cache(self) -> int:
        return (self.blocks + 1) * self.block_bytes

    @property
    def total(self) -> int:
        return max(self.placing, self.weights + self.cache + self.workspace + self.graphs)


@dataclass(frozen=True)
class Load:
    """The largest step: ``tokens`` of ``batch`` sequences; ``graphs`` says whether decode steps are recorded."""

    tokens: int
    batch: int
    graphs: bool

    @property
    def ragged(self) -> dict[str, int]:
        return {"T": self.tokens, "S": self.batch, "R": self.batch, "B": 1}

    @property
    def decode(self) -> dict[str, int]:
        return {"T": self.batch, "S": self.batch, "R": self.batch, "B": 1}


def plan_memory(
    loop: Loop,
    launched: Collection[Region],
    weights: Mapping[str, Tensor],
    place: device,
    load: Load,
    block_size: int,
    most_blocks: int,
    budget: int | None,
) -> MemoryPlan:
    """Plan for at most ``most_blocks`` blocks, or as many as fit ``budget`` bytes beyond what the model shares.

    ``launched`` are the regions that run as kernels.

    Raises:
        OptionError: the budget does not leave a single block.
    """
    graph = loop.graph
    by_type, shared, placing = constant_bytes(loop, weights, place)
    kept = by_type.total()
    result = graph.output_node().args[0]
    assert isinstance(result, Node)
    vocab = graph.options.get(VOCABULARY, prod(type_of(result).concrete(load.decode)) // load.batch)
    drawn = draw_rows(load.batch, vocab) * vocab
    sampling = _size(result, load.decode) + drawn * DRAW_BYTES
    if VOCABULARY in graph.options:
        sampling += 2 * drawn * type_of(result).torch_dtype.itemsize  # gathered, and put next to each other
    workspace = max(activation_bytes(loop, launched, load.ragged), sampling)
    if place.type == "cuda":
        workspace += _LIBRARIES
    # The logits lie outside of the pool of the graphs, in as much memory.
    graphs = activation_bytes(loop, launched, load.decode) if load.graphs else 0
    block_bytes = cache_bytes_per_token(loop) * block_size
    if budget is not None:
        room = (budget - (kept - shared) - workspace - graphs) // max(1, block_bytes) - 1
        if room < 1:
            raise OptionError(
                f"the model does not fit: weights take {kept / 1e9:.2f} GB, a step {(workspace + graphs) / 1e9:.2f} GB, and "
                f"{budget / 1e9:.2f} GB are to be had: choose smaller max_step_tokens and max_batch_size, or a larger "
                "KVCacheConfig.memory_share"
            )
        most_blocks = min(most_blocks, room)
    return MemoryPlan(by_type, shared, placing, most_blocks, block_bytes, workspace, graphs)


def constant_bytes(loop: Loop, weights: Mapping[str, Tensor], place: device) -> tuple[Counter[str], int, int]:
    """Bytes of the values that ``fold_constants`` keeps by element type, how many of them are the given weights' own
    memory, and the most that it takes on the way."""
    constants = [node for node in loop.graph.calls() if is_constant(node)]
    last_use = {source: node for node in constants for source in node.all_input_nodes}
    kept = {node for node in constants if any(not is_constant(user) for user in node.users)}
    names: set[str] = set()
    passing: dict[Node, int] = {}
    held: Counter[str] = Counter()
    shared = most = 0
    for node, time, first, last in _constants_in_order(loop):
        # What a turn has from the one before is counted there.
        size = _size(node, {}) if first or node not in loop.carries else 0
        if str(node.target) == "weight":
            name = loop.weight(node, time)
            given = known_of(weights, name)
            own = given is not None and given.device == place and given.dtype == type_of(node).torch_dtype
            in_parts = isinstance(weights, LazyWeights) and weights.reads_parts and read_in_parts(node, loop, weights)
            if name in names or in_parts or (own and node not in kept):
                size = 0
            if node in kept:
                names.add(name)
                shared += size if own else 0
        if node in kept:
            held[type_of(node).dtype] += size
        else:
            passing[node] = size
        most = max(most, held.total() - shared + sum(passing.values()))
        for source in node.all_input_nodes:
            if last_use[source] is node and last:
                passing.pop(source, None)
    return held, shared, most


def _constants_in_order(loop: Loop) -> Iterator[tuple[Node, int, bool, bool]]:
    """What is computed once, with its time, and whether it is the first and the last.

    A turn overwrites what passed in the one before.
    """
    for stage in loop.stages:
        nodes = [node for node in stage.nodes if is_constant(node)]
        for time in stage.times:
            yield from ((node, time, time == stage.times[0], time == stage.times[-1]) for node in nodes)


def activation_bytes(loop: Loop, launched: Collection[Region], dims: Mapping[str, int]) -> int:
    """The most that the values computed in one step take at a time, as an ``Executor`` keeps and frees them."""
    views = {view.region: view for view in regions_of(loop.graph)}
    views = {region: view for region, view in views.items() if region in launched}
    expiring, replaced = last_uses(loop, views), overwritten(loop, views)
    owner: dict[Node, Node] = {}
    uses: Counter[Node] = Counter()
    sizes: dict[Node, int] = {}
    live = most = 0
    done: set[Region] = set()
    for node in loop.graph.calls():
        if is_constant(node) or str(node.target) == "cache" or node in loop.carries:
            continue
        region: Region | None = node.meta.get("region")
        made, copied = [node], 0
        key: Node | Region = node
        if region is not None and region in views:
            if region in done:
                continue
            done.add(region)
            view = views[region]
            made = [item for item in view.outputs if item not in view.in_place]
            copied = sum(_size(item, dims) for item in view.inputs if op_name(item.target) in _STRIDED)
            copied += _between_kernels(view, dims)
            key = region
        for item in made:
            source = item.args[0] if key is node and op_name(item.target) in _ALIASES else replaced.get(item)
            root = owner.get(source, source) if isinstance(source, Node) else item
            owner[item] = root
            uses[root] += 1
            if root is item:
                sizes[item] = _own_size(item, dims)
                live += sizes[item]
        most = max(most, live + copied)
        for item in expiring.get(key, ()):
            root = owner.get(item, item)
            uses[root] -= 1
            if not uses[root]:
                live -= sizes.get(root, 0)
    return most


def _between_kernels(view: RegionView, dims: Mapping[str, int]) -> int:
    """Bytes that the launcher of a matmul takes for itself: for the rows of the product, for its result, and for the
    numbers of a quantised weight, which the library may multiply."""
    size = 0
    for node in view.nodes:
        if op_name(node.target) in PROJECTIONS:
            rows, weight = node.all_input_nodes[:2]
            how = scheme_of(type_of(weight).dtype)
            if how is not None and not how.dynamic and type_of(rows).concrete(dims)[0] >= LIBRARY_ROWS:
                size += prod(type_of(weight).concrete({})) * type_of(rows).torch_dtype.itemsize
            size += sum(_size(item, dims) for item in node.all_input_nodes[:1] if item in view.nodes)
            size += _size(node, dims) if node not in view.outputs else 0
    return size


def _own_size(node: Node, dims: Mapping[str, int]) -> int:
    """Bytes of a value that is new memory; several results are counted one by one, where each is taken out."""
    written = op_name(node.target) == "nn.cache_write"
    return 0 if written or isinstance(node.meta["type"], tuple) else _size(node, dims)


def _size(node: Node, dims: Mapping[str, int]) -> int:
    return sum(kind.nbytes(dims) for kind in flat_types(node.meta["type"]))
