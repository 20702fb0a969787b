"""Kernels around one matmul: the norm before it, the product, and the work on its result, tile by tile."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import Graph
from ..ir.ops import op_name
from .columns import Plan, plan
from .matmul_launch import launch_text
from .matmul_tile import MatmulTile
from .parts import finish_parts, product_part, rows_part, without_rows
from .placement import place_columns
from .rows import rows_kernel
from .signature import file_text, kernel_text, parameters
from .tile import Position
from .writer import Writer

# Names that a kernel uses beside those of its values.
_TAKEN = frozenset(
    (
        "num_rows row row_ok n_ok ok k k0 n w x tile head lane lanes cols part parts parts_ptr partial_ptr arrived_ptr "
        "place before split span first until pair upper squares inverse start acc"
    ).split()
)
_WAIT = ("if PDL:", "tl.extra.cuda.gdc_wait()")


def matmul_source(graph: Graph) -> str:
    """The file of a kernel around one matmul, without its header.

    One row is computed whole by one kernel. For several rows, the work before the product is a kernel of its own: each
    tile would do it anew. For many rows the library's product may be faster, with the rest as kernels of rows.
    """
    layout = plan(graph)
    core = product_part(graph, layout.anchor) if layout.apart else graph
    whole = plan(core)
    first, inner = rows_part(core, whole.anchor), without_rows(core, whole.anchor)
    finish = finish_parts(graph, layout.anchor)
    blocks = "BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr"
    kernels = [
        kernel_text(f"{graph.name}_row_kernel", f"{_pointers(core)}, num_rows, {blocks}", _one_row(core, whole)),
        kernel_text(
            f"{graph.name}_kernel",
            f"{_pointers(inner)}, num_rows, partial_ptr, arrived_ptr, "
            f"BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr, {blocks}",
            _many_rows(inner, plan(inner)),
            ["num_rows"],
        ),
    ]
    host = []
    for extra in [*([first] if first else []), *finish]:
        kernel, launch = rows_kernel(extra, f"launch_{extra.name}")
        kernels.append(kernel)
        host.append(launch)
    return file_text(kernels, *host, launch_text(graph, core, first, inner, finish))


def _pointers(graph: Graph) -> str:
    return ", ".join(f"{name}_ptr" for name in parameters(graph))


def _one_row(graph: Graph, layout: Plan) -> str:
    """The body for one row: products and sums without the tensor cores, which have nothing to share out."""
    weight, depth = layout.weight, layout.depth
    writer = _writer(graph)
    loop = f"for k0 in tl.static_range(0, {depth}, BLOCK_K):"
    tile = MatmulTile(graph, writer, layout, loop, "1")
    writer.line("# Programs of the same columns follow each other: they read the weight from memory once.")
    writer.line("row = (tl.program_id(0) % num_rows).to(tl.int64)")
    writer.line("tile = tl.program_id(0) // num_rows")
    tiles = place_columns(writer, layout)
    accumulators = _accumulators(layout)
    loads = _loads(layout, weight, "[:, None]", "[None, :]", ', eviction_policy="evict_first"')
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    writer.line("k = tl.arange(0, BLOCK_K)")
    writer.line(
        "# The weight depends on no other kernel: its first part is on its way while those before this one end."
    )
    for name, load in zip(accumulators, loads):
        writer.line(f"{name}_w = {load}")
    _wait(writer)
    _lookups(tile)
    tile.prepare_norms()
    for name in accumulators:
        writer.line(f"{name}_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)")
    tile.begin_squares()
    with writer.block(loop):
        tile.enter()
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        with writer.block("if k0 > 0:"):
            for name, load in zip(accumulators, loads):
                writer.line(f"{name}_w = {load}")
        value = _rows(tile, layout)
        tile.add_squares()
        for name in accumulators:
            writer.line(f"{name}_sums += {name}_w.to(tl.float32) * {value}")
        tile.leave()
    for name in accumulators:
        writer.line(f"{name} = tl.sum({name}_sums, 1)[None, :]")
    tile.finish(accumulators, tiles)
    return writer.text()


def _many_rows(graph: Graph, layout: Plan) -> str:
    """The body for several rows: a loop of small matrix products, or several programs with a part of it each."""
    weight, depth = layout.weight, layout.depth
    writer = _writer(graph)
    loop = "for k0 in range(first, until, BLOCK_K):"
    tile = MatmulTile(graph, writer, layout, loop, "BLOCK_M")
    writer.line("# Column tiles vary fastest: programs that run together share the rows, and read the weight once.")
    writer.line("row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)")
    writer.line("row_ok = row < num_rows")
    writer.line("tile = tl.program_id(0)")
    tiles = place_columns(writer, layout)
    writer.line("first, until = 0, " + str(depth))
    with writer.block("if SPLITS > 1:"):
        writer.line(f"span = ({depth} + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K")
        writer.line("first = tl.program_id(2) * span")
        writer.line(f"until = tl.minimum(first + span, {depth})")
    accumulators = _accumulators(layout)
    loads = _loads(layout, weight, "[None, :]", "[:, None]")
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    with writer.block("if EARLY:"):
        writer.line("k = first + tl.arange(0, BLOCK_K)")
        for name, load in zip(accumulators, loads):
            writer.line(f"{name}_w = {load}")
    _wait(writer)
    _lookups(tile)
    for name in accumulators:
        writer.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
    with writer.block("if EARLY:"):
        tile.enter()
        _print_rows(tile, layout, weight)
        for name in accumulators:
            writer.line(f'{name} = tl.dot(x, {name}_w, {name}, input_precision="ieee")')
        writer.line("first += BLOCK_K")
        tile.leave()
    with writer.block(loop):
        tile.enter()
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        _print_rows(tile, layout, weight)
        for name, load in zip(accumulators, loads):
            writer.line(f"w = {load}")
            writer.line(f'{name} = tl.dot(x, w, {name}, input_precision="ieee")')
        tile.leave()
    _join_splits(writer, accumulators)
    tile.finish(accumulators, tiles)
    return writer.text()


def _print_rows(tile: MatmulTile, layout: Plan, weight: Node) -> None:
    tile.writer.line(f"x = {_rows(tile, layout)}.to({weight.name}_ptr.dtype.element_ty)")


def _join_splits(writer: Writer, accumulators: list[str]) -> None:
    """Print how the programs of one tile add up their parts: the last one to arrive does, in the order of the parts."""
    size = "BLOCK_M * BLOCK_N"
    with writer.block("if SPLITS > 1:"):
        writer.line("place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)")
        writer.line(f"parts_ptr = partial_ptr + place.to(tl.int64) * (SPLITS * {len(accumulators)} * {size})")
        writer.line("parts_ptr += tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + lane")
        for number, name in enumerate(accumulators):
            writer.line(f"tl.store(parts_ptr + (tl.program_id(2) * {len(accumulators)} + {number}) * {size}, {name})")
        writer.line("tl.debug_barrier()  # one thread announces what all have written")
        writer.line('before = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu")')
        writer.line("if before + 1 < SPLITS:")
        writer.line("    return")
        writer.line("tl.debug_barrier()")
        writer.line("tl.store(arrived_ptr + place, 0)  # as the next launch expects it")
        for name in accumulators:
            writer.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
        with writer.block("for split in tl.static_range(SPLITS):"):
            for number, name in enumerate(accumulators):
                where = f"parts_ptr + (split * {len(accumulators)} + {number}) * {size}"
                writer.line(f'{name} += tl.load({where}, cache_modifier=".cg")')


def _writer(graph: Graph) -> Writer:
    return Writer({node.name for node in graph.nodes} | set(parameters(graph)) | _TAKEN)


def _wait(writer: Writer) -> None:
    with writer.block(_WAIT[0]):
        writer.line(_WAIT[1])


def _accumulators(layout: Plan) -> list[str]:
    return [f"acc{lane}" for lane in range(layout.lanes)] if layout.lanes > 1 else ["acc"]


def _loads(layout: Plan, weight: Node, across: str, along: str, more: str = "") -> list[str]:
    """A tile of the weight for each lane; ``across`` and ``along`` are the shapes of its columns and of ``k``."""
    depth = layout.depth
    return [
        f"tl.load({weight.name}_ptr + {f'(n + {offset})' if offset else 'n'}{across} * {depth} + k{along}, "
        f"mask=ok{across} & (k < {depth}){along}, other=0{more})"
        for offset in layout.offsets
    ]


def _lookups(tile: MatmulTile) -> None:
    """Print which rows are read, where they are chosen by an index."""
    for node in tile.graph.calls():
        if op_name(node.target) == "aten.index_select":
            tile.looked_up(node.args[2], ("row",), Position(("row",), tile.row_mask))  # type: ignore[arg-type]


def _rows(tile: MatmulTile, layout: Plan) -> str:
    """Print the rows of the product in its loop."""
    x = layout.anchor.args[0]
    assert isinstance(x, Node)
    value = tile.value(x, tile.at_k)
    # A norm that adds something makes other values than zero of what lies past the end.
    if any(op_name(node.target) == "nn.layer_norm" for node in tile.graph.calls() if node < layout.anchor):
        value = tile.writer.assign("masked", f"tl.where((k < {layout.depth})[None, :], {value}, 0.0)")
    return value
