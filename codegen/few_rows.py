"""The body of a matmul for a few rows, which is as fast as the weight is read.

The weight is the left operand, whose 64 rows the tensor cores take at a time: rows of activations would be padded to as
many. A tile's sums over the depth may be shared by several programs, so that all processors have the same work.
"""

from __future__ import annotations

from ..ir.graph import Graph, type_of
from .codes import dot_options, print_row_factors, sums_type
from .columns import Plan
from .coordinates import padded_width
from .matmul_loop import accumulators_of, body_writer, print_lookups, print_rows, wait
from .matmul_tile import MatmulTile
from .placement import place_columns
from .signature import print_begin
from .weights import element, is_rounded, plain_tile, print_column_factors, row_length
from .words import few_turn
from .writer import Writer


def few_rows(graph: Graph, layout: Plan) -> str:
    """The lines of the kernel, of a region without work before the product."""
    writer = body_writer(graph)
    loop = "for k0 in range(first, until, BLOCK_K):"
    tile = MatmulTile(graph, writer, layout, loop, "BLOCK_M")
    writer.line("row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)")
    writer.line("row_ok = row < num_rows")
    writer.line("tile = tl.program_id(0)")
    tiles = place_columns(writer, layout)
    writer.line(f"span = ({layout.depth} + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K")
    writer.line("first = tl.program_id(2) * span")
    writer.line(f"until = tl.minimum(first + span, {layout.depth})")
    with writer.block("if SPLITS == 1:"):
        # Of a loop that it unrolls as a whole, ptxas 12.8 takes `where(which == 0, acc, 0)` to be what acc began as: zero.
        writer.line("# Once, but no number that is known: the assembler must not unroll a short loop as a whole.")
        writer.line(f"first, until = 0, tl.num_programs(2) * {layout.depth}")
    print_begin(writer)
    column, ok = _stack_lanes(writer, layout)
    _print_prefetch(writer, layout, column, ok)
    print_column_factors(writer, layout, accumulators_of(layout))
    wait(tile)
    print_lookups(tile)
    print_row_factors(tile, layout)
    writer.line(f"acc = tl.zeros(({_stacked(layout)}, BLOCK_M), {sums_type(layout)})")
    with writer.block(f"if (SPLITS - 1) * span < {layout.depth}:"):
        writer.line("tl.assume(first < until)  # a loop that might not begin has its products one after the other")
    with writer.block(loop):
        tile.enter()
        if is_rounded(layout):
            few_turn(tile, layout, column, ok)
        else:
            writer.line("k = k0 + tl.arange(0, BLOCK_K)")
            rows = print_rows(tile, layout)
            writer.line(f"w = {plain_tile(layout, column, ok, '[:, None]', '[None, :]')}")
            writer.line(f"x = tl.trans({rows}.to({element(layout)}))")
            writer.line(f"acc = tl.dot(w, x, acc, {dot_options(layout)})")
        tile.leave()
    if sums_type(layout) != "tl.float32":
        writer.line("acc = acc.to(tl.float32)")
    _join_splits(writer, _stacked(layout))
    tile.finish(_part_lanes(writer, layout), tiles)
    return writer.text()


def _stacked(layout: Plan) -> str:
    """The number of columns of all lanes, as Triton text."""
    count = padded_width(layout.lanes)
    return "BLOCK_N" if count == 1 else f"{count} * BLOCK_N"


def _stack_lanes(writer: Writer, layout: Plan) -> tuple[str, str]:
    """Print the columns of all lanes, one lane after the other, and their mask; returns their names."""
    count = padded_width(layout.lanes)
    if count == 1:
        return "n", "ok"
    writer.line("# The columns of all lanes are one operand.")
    writer.line(f"which = tl.arange(0, {count} * BLOCK_N) // BLOCK_N")
    offset = "0"
    for lane, columns in enumerate(layout.offsets):
        offset = f"tl.where(which == {lane}, {columns}, {offset})" if columns else offset
    writer.line(f"across = tl.reshape(tl.broadcast_to(n[None, :], {count}, BLOCK_N), ({count} * BLOCK_N,)) + {offset}")
    wide = f"tl.reshape(tl.broadcast_to(ok[None, :], {count}, BLOCK_N), ({count} * BLOCK_N,))"
    writer.line(f"across_ok = {wide} & (which < {layout.lanes})")
    return "across", "across_ok"


def _part_lanes(writer: Writer, layout: Plan) -> list[str]:
    """Print the sums of each lane, with the rows first; returns their names."""
    names, count = accumulators_of(layout), padded_width(layout.lanes)
    if count == 1:
        writer.line("acc = tl.trans(acc)")
        return names
    writer.line(f"acc = tl.reshape(acc, ({count}, BLOCK_N, BLOCK_M))")
    writer.line(f"which = tl.arange(0, {count})[:, None, None]")
    for lane, name in enumerate(names):
        writer.line(f"{name} = tl.trans(tl.sum(tl.where(which == {lane}, acc, 0.0), 0))")
    return names


def _print_prefetch(writer: Writer, layout: Plan, column: str, ok: str) -> None:
    """Print how the beginning of the weight is sent for while the kernels in front end: it depends on none of them."""
    size = type_of(layout.weight).torch_dtype.itemsize
    if is_rounded(layout):
        return  # it is counted in codes here, and tried with none of them yet
    if row_length(layout) * size % 16:
        return  # rows begin at addresses that the copy engine does not take
    writer.line("# The weight depends on no other kernel: its beginning is on its way while those before this one end.")
    with writer.block("if PDL and AHEAD > 0:"), writer.block(f"if first + AHEAD <= {layout.depth}:"):
        where = f"tl.where({ok}, {column}, 0) * {row_length(layout)} + first"
        writer.line(f"prefetch({layout.weight.name}_ptr + {where}, AHEAD * {size})")


def _join_splits(writer: Writer, columns: str) -> None:
    """Print how the programs of one tile add up their parts: the last one to arrive does, in the order of the parts."""
    with writer.block("if SPLITS > 1:"):
        writer.line("place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)")
        writer.line(f"parts_ptr = partial_ptr + place.to(tl.int64) * (SPLITS * {columns} * BLOCK_M)")
        writer.line("token = tl.arange(0, BLOCK_M)")
        writer.line(f"here = tl.arange(0, {columns})[:, None] * BLOCK_M + token[None, :]")
        writer.line("used = (tl.program_id(1) * BLOCK_M + token < num_rows)[None, :]")
        writer.line(f"tl.store(parts_ptr + tl.program_id(2) * ({columns} * BLOCK_M) + here, acc, mask=used)")
        writer.line("tl.debug_barrier()  # one thread announces what all have written")
        writer.line('before = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu")')
        writer.line("if before + 1 < SPLITS:")
        writer.line("    return")
        writer.line("tl.debug_barrier()")
        writer.line("tl.store(arrived_ptr + place, 0)  # as the next launch expects it")
        writer.line(f"acc = tl.zeros(({columns}, BLOCK_M), tl.float32)")
        with writer.block("for split in tl.static_range(SPLITS):"):
            where = f"parts_ptr + split * ({columns} * BLOCK_M) + here"
            writer.line(f'acc += tl.load({where}, mask=used, other=0, cache_modifier=".cg")')
