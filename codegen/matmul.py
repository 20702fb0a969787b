"""Kernels around one matmul: the norm before it, the product, and the work on its result, tile by tile."""

from __future__ import annotations

from ..ir.graph import Graph
from .codes import dot_options, in_fours, print_row_factors, row_fours, sums_type, weight_fours
from .columns import Plan, plan
from .exchange import SENDING, UNSPECIALISED, sent_by
from .few_rows import few_rows
from .matmul_launch import launch_text
from .matmul_loop import accumulators_of, body_writer, print_lookups, print_rows, wait, weight_loads
from .matmul_tile import MatmulTile
from .numbers import numbers_kernel
from .parts import finish_parts, product_part, rows_part, without_rows
from .placement import place_columns
from .rows import rows_kernel
from .signature import file_text, kernel_text, parameters, print_begin
from .weights import element, in_codes, is_rounded, print_column_factors
from .words import STREAMED, begin_row, end_row, many_turn, row_loads, row_turn


def matmul_source(graph: Graph) -> str:
    """The file of a kernel around one matmul, without its header.

    One row is computed whole by one kernel. For several rows, or one that is rounded, the work before the product is a kernel
    of its own: each tile would do it anew. For many rows the library's product may be faster, with the rest as kernels of rows.
    """
    layout = plan(graph)
    core = product_part(graph, layout.anchor) if layout.apart else graph
    whole = plan(core)
    first, inner = rows_part(core, whole.anchor), without_rows(core, whole.anchor)
    single = inner if in_codes(layout) else core
    finish = finish_parts(graph, layout.anchor)
    sends = sent_by(graph) is not None
    sending = "".join(f"{name}, " for name in SENDING) + "SEND: tl.constexpr, " if sends else ""
    free = list(UNSPECIALISED) if sends else []
    blocks = f"{sending}BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr"
    rows = f"BLOCK_M: tl.constexpr, {blocks}"
    parts = f"partial_ptr, arrived_ptr, SPLITS: tl.constexpr, AHEAD: tl.constexpr, {rows}"
    kernels = [
        kernel_text(
            f"{graph.name}_row_kernel", f"{_pointers(single)}, num_rows, {blocks}", _one_row(single, plan(single)), free
        ),
        kernel_text(
            f"{graph.name}_few_kernel",
            f"{_pointers(inner)}, num_rows, {parts}",
            few_rows(inner, plan(inner)),
            ["num_rows", *free],
        ),
        kernel_text(
            f"{graph.name}_kernel",
            f"{_pointers(inner)}, num_rows, EARLY: tl.constexpr, {rows}",
            _many_rows(inner, plan(inner)),
            ["num_rows", *free],
        ),
    ]
    host = []
    more = [rows_kernel(extra, f"launch_{extra.name}") for extra in [*([first] if first else []), *finish]]
    if is_rounded(layout):
        more.append(numbers_kernel(graph.name, layout))
    for kernel, launch in more:
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
    rounded, fours = is_rounded(layout), in_fours(layout)
    loads = weight_fours(layout, STREAMED) if fours else weight_loads(layout, more=STREAMED)
    width, numbers = ("BLOCK_K // 4", "word = k0 // 4") if fours else ("BLOCK_K", "k = k0")
    print_begin(writer)
    if not rounded:
        writer.line(f"{numbers.partition(' ')[0]} = tl.arange(0, {width})")
    writer.line(
        "# The weight depends on no other kernel: its first part is on its way while those before this one end."
    )
    if rounded:
        row_loads(tile, layout, accumulators, "0")
    else:
        for name, load in zip(accumulators, loads):
            writer.line(f"{name}_w = {load}")
    print_column_factors(writer, layout, accumulators)
    wait(tile)
    print_lookups(tile)
    print_row_factors(tile, layout)
    tile.prepare_norms()
    if rounded:
        begin_row(tile, layout, accumulators)
    else:
        for name in accumulators:
            writer.line(f"{name}_sums = tl.zeros((BLOCK_N, {width}), {sums_type(layout)})")
        tile.begin_squares("BLOCK_K")
    with writer.block(loop):
        tile.enter()
        if rounded:
            row_turn(tile, layout, accumulators)
        else:
            writer.line(f"{numbers} + tl.arange(0, {width})")
            with writer.block("if k0 > 0:"):
                for name, load in zip(accumulators, loads):
                    writer.line(f"{name}_w = {load}")
            if fours:
                writer.line(f"codes = {row_fours(layout)}")
                for name in accumulators:
                    writer.line(f"{name}_sums = add_fours({name}_w, codes, {name}_sums, PDL)")
            else:
                value = print_rows(tile, layout)
                value = f"{value}.to(tl.float32)" if in_codes(layout) else value
                tile.add_squares()
                for name in accumulators:
                    writer.line(f"{name}_sums += {name}_w.to(tl.float32) * {value}")
        tile.leave()
    if rounded:
        end_row(tile, layout, accumulators)
    else:
        for name in accumulators:
            writer.line(f"{name} = tl.sum({name}_sums, 1){'.to(tl.float32)' if fours else ''}[None, :]")
    tile.finish(accumulators, tiles)
    return writer.text()


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
    x, rounded = element(layout), is_rounded(layout)
    print_begin(writer)
    writer.line("first = 0")
    print_column_factors(writer, layout, accumulators)
    if not rounded:
        with writer.block("if EARLY:"):
            writer.line("k = tl.arange(0, BLOCK_K)")
            for name, load in zip(accumulators, loads):
                writer.line(f"{name}_w = {load}")
    wait(tile)
    print_lookups(tile)
    print_row_factors(tile, layout)
    for name in accumulators:
        writer.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), {sums_type(layout)})")
    if not rounded:
        with writer.block("if EARLY:"):
            tile.enter()
            writer.line(f"x = {print_rows(tile, layout)}.to({x})")
            for name in accumulators:
                writer.line(f"{name} = tl.dot(x, {name}_w, {name}, {dot_options(layout)})")
            writer.line("first += BLOCK_K")
            tile.leave()
    with writer.block(loop):
        tile.enter()
        if rounded:
            many_turn(tile, layout, accumulators)
        else:
            writer.line("k = k0 + tl.arange(0, BLOCK_K)")
            writer.line(f"x = {print_rows(tile, layout)}.to({x})")
            for name, load in zip(accumulators, loads):
                writer.line(f"w = {load}")
                writer.line(f"{name} = tl.dot(x, w, {name}, {dot_options(layout)})")
        tile.leave()
    if sums_type(layout) != "tl.float32":
        for name in accumulators:
            writer.line(f"{name} = {name}.to(tl.float32)")
    tile.finish(accumulators, tiles)
    return writer.text()
