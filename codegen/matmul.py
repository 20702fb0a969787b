"""Kernels around one matmul: the norm before it, the product, and the work on its result, tile by tile."""

from __future__ import annotations

from ..ir.graph import Graph
from .columns import Plan, plan
from .few_rows import few_rows
from .matmul_launch import launch_text
from .matmul_loop import accumulators_of, body_writer, print_lookups, print_rows, wait, weight_loads
from .matmul_tile import MatmulTile
from .parts import finish_parts, product_part, rows_part, without_rows
from .placement import place_columns
from .rows import rows_kernel
from .signature import file_text, kernel_text, parameters
from .weights import element, group_values, is_rounded, nibble, packs_nibbles, print_words

# A weight is read once.
_STREAMED = ', eviction_policy="evict_first"'


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
    rows = f"BLOCK_M: tl.constexpr, {blocks}"
    parts = f"partial_ptr, arrived_ptr, SPLITS: tl.constexpr, AHEAD: tl.constexpr, {rows}"
    kernels = [
        kernel_text(f"{graph.name}_row_kernel", f"{_pointers(core)}, num_rows, {blocks}", _one_row(core, whole)),
        kernel_text(
            f"{graph.name}_few_kernel",
            f"{_pointers(inner)}, num_rows, {parts}",
            few_rows(inner, plan(inner)),
            ["num_rows"],
        ),
        kernel_text(
            f"{graph.name}_kernel",
            f"{_pointers(inner)}, num_rows, EARLY: tl.constexpr, {rows}",
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
    writer = body_writer(graph)
    loop = f"for k0 in tl.static_range(0, {layout.depth}, BLOCK_K):"
    tile = MatmulTile(graph, writer, layout, loop, "1")
    writer.line("# Programs of the same columns follow each other: they read the weight from memory once.")
    writer.line("row = (tl.program_id(0) % num_rows).to(tl.int64)")
    writer.line("tile = tl.program_id(0) // num_rows")
    tiles = place_columns(writer, layout)
    accumulators = accumulators_of(layout)
    loads = weight_loads(layout, more=_STREAMED)
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    writer.line(
        "# The weight depends on no other kernel: its first part is on its way while those before this one end."
    )
    if packs_nibbles(layout):
        writer.line("word = tl.arange(0, BLOCK_K // 4)")
        for name, column in zip(accumulators, _columns(layout)):
            print_words(writer, layout, f"{name}_w", column, "ok", _STREAMED)
    else:
        writer.line("k = tl.arange(0, BLOCK_K)")
        for name, load in zip(accumulators, loads):
            writer.line(f"{name}_w = {load}")
    wait(writer)
    print_lookups(tile)
    tile.prepare_norms()
    for name in accumulators:
        writer.line(
            f"{name}_sums = tl.zeros((BLOCK_N, BLOCK_K{' // 32' if packs_nibbles(layout) else ''}), tl.float32)"
        )
    tile.begin_squares("BLOCK_K // 4" if packs_nibbles(layout) else "BLOCK_K")
    with writer.block(loop):
        tile.enter()
        if packs_nibbles(layout):
            _row_by_nibbles(tile, layout, accumulators)
        else:
            writer.line("k = k0 + tl.arange(0, BLOCK_K)")
            with writer.block("if k0 > 0:"):
                for name, load in zip(accumulators, loads):
                    writer.line(f"{name}_w = {load}")
            value = print_rows(tile, layout)
            tile.add_squares()
            for name in accumulators:
                writer.line(f"{name}_sums += {name}_w.to(tl.float32) * {value}")
        tile.leave()
    for name in accumulators:
        writer.line(f"{name} = tl.sum({name}_sums, 1)[None, :]")
    tile.finish(accumulators, tiles)
    return writer.text()


def _columns(layout: Plan) -> list[str]:
    """The columns of each lane."""
    return [f"(n + {offset})" if offset else "n" for offset in layout.offsets]


def _row_by_nibbles(tile: MatmulTile, layout: Plan, accumulators: list[str]) -> None:
    """Print a turn of the loop over words of four codes, whose products are summed by blocks of 32 before the factors."""
    writer = tile.writer
    writer.line("word = k0 // 4 + tl.arange(0, BLOCK_K // 4)")
    writer.line("block = k0 // 32 + tl.arange(0, BLOCK_K // 32)")
    with writer.block("if k0 > 0:"):
        for name, column in zip(accumulators, _columns(layout)):
            print_words(writer, layout, f"{name}_w", column, "ok", _STREAMED)
    for place in range(4):
        tile.enter()
        writer.line(f"k = word // 8 * 32 + word % 8 + {8 * place}")
        value = print_rows(tile, layout)
        tile.add_squares()
        for name in accumulators:
            first = f"{name}_turn =" if place == 0 else f"{name}_turn +="
            writer.line(f"{first} {nibble(layout, f'{name}_w', place)} * {value}")
        writer.line(f"row_turn = {value}" if place == 0 else f"row_turn += {value}")
        tile.leave()
    for name, column in zip(accumulators, _columns(layout)):
        factors, zeros = group_values(layout, column, "ok", "block")
        blocks = f"tl.sum(tl.reshape({name}_turn, (BLOCK_N, BLOCK_K // 32, 8)), 2)"
        if zeros:
            blocks = f"({blocks} - tl.sum(tl.reshape(row_turn, (1, BLOCK_K // 32, 8)), 2) * {zeros})"
        writer.line(f"{name}_sums += {blocks} * {factors}")


def _many_rows(graph: Graph, layout: Plan) -> str:
    """The body for many rows: a loop of small matrix products."""
    writer = body_writer(graph)
    loop = f"for k0 in range(first, {layout.depth}, BLOCK_K):"
    tile = MatmulTile(graph, writer, layout, loop, "BLOCK_M")
    writer.line("# Column tiles vary fastest: programs that run together share the rows, and read the weight once.")
    writer.line("row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)")
    writer.line("row_ok = row < num_rows")
    writer.line("tile = tl.program_id(0)")
    tiles = place_columns(writer, layout)
    accumulators = accumulators_of(layout)
    loads = weight_loads(layout, "[None, :]", "[:, None]")
    x = element(layout)
    cast = f".to({x})" if is_rounded(layout) else ""
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    writer.line("first = 0")
    with writer.block("if EARLY:"):
        writer.line("k = tl.arange(0, BLOCK_K)")
        for name, load in zip(accumulators, loads):
            writer.line(f"{name}_w = {load}{cast}")
    wait(writer)
    print_lookups(tile)
    for name in accumulators:
        writer.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
    with writer.block("if EARLY:"):
        tile.enter()
        writer.line(f"x = {print_rows(tile, layout)}.to({x})")
        for name in accumulators:
            writer.line(f'{name} = tl.dot(x, {name}_w, {name}, input_precision="ieee")')
        writer.line("first += BLOCK_K")
        tile.leave()
    with writer.block(loop):
        tile.enter()
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        writer.line(f"x = {print_rows(tile, layout)}.to({x})")
        for name, load in zip(accumulators, loads):
            writer.line(f"w = {load}{cast}")
            writer.line(f'{name} = tl.dot(x, w, {name}, input_precision="ieee")')
        tile.leave()
    tile.finish(accumulators, tiles)
    return writer.text()
