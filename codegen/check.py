"""Check a kernel against its reference on random inputs, and time it. Emitted kernel files call ``main``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from ..ir.dist import Mirror, ranks_of
from ..ir.draws import draw_distinct, draw_floats, index_range, row_axis
from ..ir.graph import Graph, dims_of, type_of
from ..ir.interpret import bind_dims, interpret
from ..ir.ops import op_name, resolve
from ..ir.parse import parse
from ..ir.quantized import dequantize, is_quantised, quantize
from ..ir.schemes import scheme_of
from ..ir.tiles import TILE_LARGEST
from ..ir.twin import widened, windows_of
from .exchange import MirrorExchange, meeting_of, places_for
from .kernels import Kernel, kernel_file
from .launch import load_launch
from .signature import fresh_outputs

# Relative RMSE against the reference computed in fp32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# The same where a kernel makes codes: what lies half-way between two may become either.
CODES_TOLERANCE = 1e-2


def random_case(graph: Graph, tokens: int, sequences: int, seed: int, device: torch.device | str) -> dict[str, Tensor]:
    """Random values for the inputs of a region, valid for the operators that read them.

    ``tokens`` are split over ``sequences`` whose caches hold some older tokens as well.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = min(sequences, tokens)
    cuts = (
        sorted(torch.randperm(tokens - 1, generator=generator)[: sequences - 1].add(1).tolist()) if tokens > 1 else []
    )
    starts = [0, *cuts, tokens]
    older = torch.randint(0, 40, (sequences,), generator=generator).tolist()
    older[0] += max(windows_of(graph), default=0)  # keys that the window hides
    block = _block_size(graph)
    lengths = [last - first + past for first, last, past in zip(starts, starts[1:], older)]
    blocks = [-(-length // block) for length in lengths]
    dims = {"T": tokens, "S": sequences, "B": max(blocks), "C": (sum(blocks) + 2) * block, "R": min(tokens, 5)}
    order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    tables = torch.zeros(sequences, dims["B"], dtype=torch.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    special = {
        "query_starts": torch.tensor(starts, dtype=torch.int32),
        "context_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_tables": tables,
    }
    ranked = {
        type_of(node.all_input_nodes[0]).shape[-1] for node in graph.calls() if op_name(node.target) in TILE_LARGEST
    }
    case = {}
    for node in graph.inputs():
        kind = type_of(node)
        shape = kind.concrete(dims)
        role = _role(node)
        if role in special:
            case[node.name] = special[role].to(device)
        elif role == "slots":
            case[node.name] = torch.randperm(dims["C"], generator=generator)[:tokens].to(device)
        elif scheme := scheme_of(kind.dtype):
            case[node.name] = quantize(draw_floats(kind.with_dtype("f32"), shape, generator), scheme).to(device)
        elif kind.dtype == "i8":
            case[node.name] = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
        elif kind.torch_dtype.is_floating_point and row_axis(kind) == 0 and shape[-1] in ranked:
            case[node.name] = draw_distinct(kind, shape, generator).to(device)
        elif kind.torch_dtype.is_floating_point:
            case[node.name] = draw_floats(kind, shape, generator).to(device)
        else:
            first, end = index_range(node, dims)
            end = min(end, first + 64)
            if any(op_name(user.target) == "nn.lookup" for user in node.users):
                end *= 2  # some that it has no row for
            case[node.name] = torch.randint(first, end, shape, generator=generator).to(kind.torch_dtype).to(device)
    return case


def _block_size(graph: Graph) -> int:
    """Tokens in a block of the cache."""
    sizes = [int(str(node.args[6])) for node in graph.calls() if op_name(node.target) == "nn.paged_attention"]
    return sizes[0] if sizes else 16


def _role(node: Node) -> str:
    """What an integer input is for, from the operator that reads it."""
    for user in node.users:
        name = op_name(user.target)
        if name == "nn.cache_write" and user.args[2] is node:
            return "slots"
        if name == "nn.paged_attention":
            roles = {3: "block_tables", 4: "query_starts", 5: "context_lens"}
            for place, role in roles.items():
                if user.args[place] is node:
                    return role
    return ""


def run_kernel(
    graph: Graph, launch: Callable[..., None], case: Mapping[str, Tensor], order: tuple[int, ...]
) -> list[Tensor]:
    """Launch a kernel on a case; its results are poisoned with NaN before. Returns every result of the region.

    Where ranks meet, the others have what this one has.
    """
    values = _arguments(graph, case, order)
    among_mirrors(graph, launch, values[0].device)(*values)
    names = [*graph.inputs(), *fresh_outputs(graph)]
    held = {names[place]: value for place, value in zip(order, values)}
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    return [held[node] if node in held else held[node.args[0]] for node in results]  # type: ignore[index]


def among_mirrors(graph: Graph, launch: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """A launcher of a kernel that runs by itself, though it may meet those of other ranks."""
    meeting = meeting_of(graph)
    if meeting is None:
        return launch
    exchange = MirrorExchange(places_for(graph), device)
    if op_name(meeting.target) != "dist.receive":
        return partial(launch, ranks=exchange)
    source = meeting.all_input_nodes[0]
    sender = sender_of(graph, source)
    send = load_launch(Kernel(sender.name, kernel_file(sender), sender), exchange=exchange)
    place = list(graph.inputs()).index(source)

    def sent_and_launched(*values: Tensor) -> None:
        send(values[place], torch.empty_like(values[place]))
        launch(*values, ranks=exchange)

    return sent_and_launched


def sender_of(graph: Graph, value: Node) -> Graph:
    """A region that sends a value to the ranks that another one, ``graph``, is for."""
    made = Graph("send")
    x = made.placeholder("x")
    sent = made.call_function(resolve("dist.send"), (x, ranks_of(graph)))
    x.name, sent.name = "x", "x_sent"
    x.meta["type"] = sent.meta["type"] = type_of(value)
    made.output([sent])
    made.dims = {name: graph.dims[name] for name in dims_of([type_of(value)])}
    return made


def _arguments(graph: Graph, case: Mapping[str, Tensor], order: tuple[int, ...]) -> list[Tensor]:
    """The arguments of a launcher: copies of the inputs, and results full of NaN."""
    dims = bind_dims(graph, case)
    device = next(iter(case.values())).device
    values = [case[node.name].clone() for node in graph.inputs()]
    for node in fresh_outputs(graph):
        kind = type_of(node).stored
        fill = float("nan") if kind.torch_dtype.is_floating_point else -1
        values.append(torch.full(kind.concrete(dims), fill, device=device).to(kind.torch_dtype))
    return [values[place] for place in order]


def reference(graph: Graph, case: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What the kernel should compute, with all floats in fp32."""
    wide = widened(graph)
    inputs = {node.name: case[node.name].to(type_of(node).torch_dtype, copy=True) for node in wide.inputs()}
    return interpret(wide, inputs, {}, group=Mirror(ranks_of(graph)))


def errors(
    graph: Graph, launch: Callable[..., None], order: tuple[int, ...], case: Mapping[str, Tensor]
) -> list[float]:
    """Relative RMSE of every result, of codes that of the numbers they stand for; NaN where something was left unwritten."""
    found = []
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    for node, *pair in zip(results, run_kernel(graph, launch, case, order), reference(graph, case)):
        kind = type_of(node)
        numbers = [dequantize(value, kind, torch.float32) for value in pair] if is_quantised(node) else pair
        ours, theirs = (value.double().flatten() for value in numbers)
        known = theirs.isfinite()
        same = torch.equal(ours[~known].nan_to_num(0.0), theirs[~known].nan_to_num(0.0))  # masked out with -inf, say
        ours, theirs = ours[known], theirs[known]
        found.append(float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)) if same else math.nan)
    return found


def main(text: str, launch: Callable[..., None]) -> None:
    """Check and time a kernel file on the GPU: prints errors, microseconds and GB/s for decode and prefill sizes."""
    graph = parse(text)
    order = Kernel(graph.name, "", graph).order
    device = torch.device("cuda")
    launch = among_mirrors(graph, launch, device)
    for tokens, sequences in ((1, 1), (8, 8), (131, 3), (1024, 4)):
        case = random_case(graph, tokens, sequences, tokens, device)
        worst = max(errors(graph, launch, order, case))
        values = _arguments(graph, case, order)
        micros = time_launch(lambda values=values: launch(*values))  # type: ignore[misc]
        # A cache is not read whole; what the kernel moves at most is the other arguments, once each.
        moved = sum(item.numel() * item.element_size() for item in values)
        moved -= sum(case[node.name].nbytes for node in graph.inputs() if node.name.endswith("_cache"))
        print(
            f"{graph.name}, {tokens} tokens: relative RMSE {worst:.1e}, {micros:.1f} us, "
            f"{moved / micros / 1e3:.0f} GB/s"
        )


def time_launch(run: Callable[[], object], repeats: int = 50) -> float:
    """Median microseconds of a launch on the GPU."""
    import triton.testing

    times: list[float] = triton.testing.do_bench(run, rep=repeats, return_mode="all")
    return 1e3 * statistics.median(times)
