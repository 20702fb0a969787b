"""The host's part of an emitted matmul file: its tilings, which of them is for how many rows, and ``launch``."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import PROJECTIONS, op_name
from .codes import scaled_product
from .columns import Plan, plan
from .coordinates import padded_width
from .exchange import sent_by
from .matmul_tilings import tilings_of, weight_bytes
from .placement import tile_count
from .rank_rows import sending_text
from .signature import COUNTERS, fresh_outputs, parameters, pointer_types, types_text
from .weights import in_codes, is_rounded

_TILINGS = '''\
def row(block_n, block_k, num_warps):
    """One row by block_n columns a program."""
    return {
        "kernel": $NAME$_row_kernel, "signature": $ROW_TYPES$,
        "constexprs": {$SENT$"BLOCK_N": block_n, "BLOCK_K": block_k, "PDL": False}, "num_warps": num_warps, "num_stages": 1,
    }


def few(block_m, block_n, block_k, num_warps, num_stages, splits, early=True):
    """block_m rows by block_n columns a program, and the sums over depth in so many parts."""
    # As much of the weight is sent for early as is on its way at any time.
    ahead = min(block_k * num_stages, $DEPTH$ // splits // block_k * block_k) if early else 0
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLITS": splits, "AHEAD": ahead, "PDL": False}
    pointers = {"partial_ptr": "*fp32", "arrived_ptr": "*i32"} if splits > 1 else {}
    absent = {} if splits > 1 else {"partial_ptr": None, "arrived_ptr": None}
    return {
        "kernel": $NAME$_few_kernel, "signature": {**$TILE_TYPES$, **pointers},
        "constexprs": {$SENT$**blocks, **absent}, "num_warps": num_warps, "num_stages": num_stages,
    }


def tile(block_m, block_n, block_k, num_warps, num_stages):
    """block_m rows by block_n columns a program."""
    # For few rows, as much of the weight as registers hold is loaded before the kernel in front has ended.
    early = block_m <= 16 and $LANES$ * block_n * block_k <= $EARLY$ * num_warps
    return {
        "kernel": $NAME$_kernel, "signature": $TILE_TYPES$,
        "constexprs": {$SENT$"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "EARLY": early, "PDL": False},
        "num_warps": num_warps, "num_stages": num_stages,
    }


$COUNTERS$

def workspace(blocks, tiles, device):
    """Memory for the parts of so many tiles, if there are several of each."""
    if blocks["SPLITS"] == 1:
        return {}
    size = $STACK$ * blocks["BLOCK_N"] * blocks["BLOCK_M"]
    partial = torch.empty(tiles * blocks["SPLITS"] * size, dtype=torch.float32, device=device)
    return {"partial_ptr": partial, "arrived_ptr": counters(device, triton.next_power_of_2(tiles))}


$LIBRARY$
CONFIGS = [
$CONFIGS$
]
# Which of them is for how many rows: each for up to so many, the last for all others.
CHOICES = $CHOICES$
VARIANTS = [*(CONFIGS[index] for _, index in CHOICES if CONFIGS[index])$EXTRA$]
'''

_SENDERS = ", *(with_sending(CONFIGS[index]) for _, index in CHOICES if CONFIGS[index])"

_LAUNCH = """\
def launch($ARGUMENTS$, choices=CHOICES$RANKS$):
    num_rows = $ROWS$.shape[0]
    if num_rows == 0:
        return
    config = CONFIGS[next(index for most, index in choices if most is None or num_rows <= most)]
    blocks = config.get("constexprs", {})
$BODY$"""


def launch_text(graph: Graph, core: Graph, first: Graph | None, inner: Graph, finish: list[Graph]) -> str:
    """The text for a region: ``core`` is what the kernels of its product compute, all of it or the product alone.

    ``first`` is the work before the product, ``inner`` the core without it, ``finish`` the work after the product.
    """
    layout = plan(core)
    configs: list[str] = []
    choices: list[tuple[int | None, int]] = []
    for most, kind, tilings in tilings_of(layout):
        if not choices or choices[-1][0] != most:
            choices.append((most, len(configs)))
        configs += [f"    {kind}({', '.join(map(str, tiling))})," for tiling in tilings]
    library = "# What may be measured against each other."
    scaled = scaled_product(layout)
    if _has_library(layout):
        choices[-1] = (None, len(configs))
        configs.append("    LIBRARY,")
        library = f"{scaled}{library[:-1]}; the product of the library comes without a kernel.\nLIBRARY = {{}}"
    extra = [item.name.upper() for item in [*([first] if first else []), *finish]]
    extra += [f"{graph.name.upper()}_NUMBERS"] if is_rounded(layout) else []
    count = {"num_rows": "i32"}
    words = {
        "COUNTERS": COUNTERS,
        "LIBRARY": library,
        "NAME": graph.name,
        "ROW_TYPES": types_text({**pointer_types(inner if in_codes(layout) else core), **count}),
        "LANES": str(layout.lanes),
        "EARLY": str(8192 // weight_bytes(layout)),
        "STACK": str(padded_width(layout.lanes)),
        "DEPTH": str(layout.depth),
        "TILE_TYPES": types_text({**pointer_types(inner), **count}),
        "CONFIGS": "\n".join(configs),
        "CHOICES": str(choices),
        "EXTRA": "".join(f", {name}" for name in extra) + (_SENDERS if sent_by(graph) else ""),
        "ARGUMENTS": ", ".join(parameters(graph)),
        "ROWS": _row_input(core, layout.anchor),
        "BODY": "".join(f"    {line}\n" for line in _body(graph, core, first, inner, finish)),
    }
    sends = sent_by(graph)
    words |= {"SENT": "**NOT_SENT, " if sends else "", "RANKS": ", ranks=None" if sends else ""}
    text = f"{sending_text(sends) if sends else ''}{_TILINGS}\n\n{_LAUNCH}"
    for name, value in words.items():
        text = text.replace(f"${name}$", value)
    return text


def _body(graph: Graph, core: Graph, first: Graph | None, inner: Graph, finish: list[Graph]) -> list[str]:
    """The lines that launch one row, a tiling, or the product of the library."""
    layout = plan(core)
    anchor, tiles = layout.anchor, tile_count(layout, 'blocks["BLOCK_N"]')
    apart = list(core.output_node().args[0]) == [anchor] and bool(finish)  # type: ignore[arg-type]
    device = f"{_row_input(core, anchor)}.device"
    # The caller may want the product itself as well.
    given = any(node.name == anchor.name for node in fresh_outputs(graph))
    done = [_finished(item) for item in finish] if apart else []
    lines = ["to_ranks = sending(ranks, num_rows)"] if sent_by(graph) is not None else []
    lines += [_empty(anchor, device)] if apart and not given else []
    single = inner if in_codes(layout) else core
    sent = ", **to_ranks" if sent_by(graph) is not None else ""
    row = f"run(config, ({tiles} * num_rows,), {', '.join(parameters(single))}, num_rows{sent})"
    before = (
        [_empty(fresh_outputs(first)[0], device), f"launch_{first.name}({', '.join(parameters(first))})"]
        if first
        else []
    )
    alone = ['if config and "BLOCK_M" not in blocks:', *_indented(_returned(row, done))]
    lines += [*before, *alone] if single is inner else [*alone, *before]
    columns, rows = tiles, 'triton.cdiv(num_rows, blocks["BLOCK_M"])'
    arguments = f"{', '.join(parameters(inner))}, num_rows"
    few = f"run(config, grid, {arguments}, **workspace(blocks, grid[0] * grid[1], {device}){sent})"
    grid = f'grid = ({columns}, {rows}, blocks["SPLITS"])'
    lines += ['if config and "SPLITS" in blocks:', *_indented([grid, *_returned(few, done)])]
    lines += ["if config:", *_indented(_returned(f"run(config, ({columns}, {rows}), {arguments}{sent})", done))]
    if not _has_library(layout):
        return lines
    return lines + _library(inner, finish, given, "" if apart or given else device)


def _has_library(layout: Plan) -> bool:
    """Whether the library multiplies such operands, or the numbers that they stand for."""
    return bool(scaled_product(layout)) if in_codes(layout) else True


def _returned(call: str, done: list[str]) -> list[str]:
    """Lines that return what ``call`` does, for those who measure, after the rest is done."""
    return [f"made = {call}", *done, "return made"] if done else [f"return {call}"]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _library(inner: Graph, finish: list[Graph], given: bool, device: str) -> list[str]:
    """The lines for the library's product. Its place is there already if no device is named; ``given`` if it is wanted."""
    anchor = next(node for node in inner.calls() if op_name(node.target) in PROJECTIONS)
    x, weight, *bias = anchor.args[:3]
    product = f"{x}, numbers_of({weight}).t()" if is_rounded(plan(inner)) else f"{x}, {weight}.t()"
    added = bias[0] if bias and bias[0] is not None else None
    codes = op_name(anchor.target) == "nn.scaled_linear"
    if added is None and len(finish) == 1 and not given and not codes:
        added = _summand(finish[0], anchor)  # the library adds it where it would add a bias
        finish = [] if added is not None else finish

    def into(place: str) -> str:
        if codes:
            return f"scaled_product({x}, {weight}, {added}, {place})"
        return f"torch.mm({product}, out={place})" if added is None else f"torch.addmm({added}, {product}, out={place})"

    lines = []
    if finish and all(op_name(call.target) == "dist.send" for item in finish for call in item.calls()):
        lines = [
            'if not to_ranks["SEND"]:',
            f"    {into(fresh_outputs(inner)[0].name)}",
            "    return",
        ]  # the product itself
    lines += [_empty(anchor, device)] if finish and device else []
    place = anchor.name if finish or given else fresh_outputs(inner)[0].name
    return [*lines, into(place), *map(_finished, finish)]


def _finished(graph: Graph) -> str:
    """The launch of work on the product."""
    return f"launch_{graph.name}({', '.join(parameters(graph))}{', to_ranks' if sent_by(graph) else ''})"


def _summand(finish: Graph, anchor: Node) -> Node | None:
    """What is added to the product, if that is all that happens to it."""
    calls = list(finish.calls())
    if len(calls) != 1 or op_name(calls[0].target) != "aten.add.Tensor" or len(fresh_outputs(finish)) != 1:
        return None
    inputs = calls[0].all_input_nodes
    others = [node for node in inputs if node.name != anchor.name]
    alike = len({type_of(node) for node in [*inputs, calls[0]]}) == 1
    return others[0] if len(inputs) == 2 and len(others) == 1 and alike and not calls[0].kwargs else None


def _empty(node: Node, device: str) -> str:
    kind = type_of(node)
    return f"{node.name} = torch.empty(num_rows, {kind.stored.shape[1]}, dtype={kind.torch_dtype}, device={device})"


def _row_input(graph: Graph, anchor: Node) -> str:
    """An input or result whose first dim is the number of rows."""
    rows = type_of(anchor).shape[0]
    for node in graph.inputs():
        if type_of(node).shape[:1] == (rows,):
            return node.name
    raise AssertionError("a matmul reads rows")
