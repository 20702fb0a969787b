"""Turns of a matmul's loop over the depth where the weight is quantised: words of codes, one place of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from .columns import Plan
from .matmul_loop import print_rows
from .matmul_tile import MatmulTile
from .weights import element, packed_rows, scheme

STREAMED = ', eviction_policy="evict_first"'
"""How a weight is read that is read once, as Triton text."""

# One row is multiplied with codes that count 2^-149 in the lowest bits of a word: it is raised so that the products lie
# well within fp32 for any row below 2^44.
_RAISED = 84
_LOWERED = 2.0 ** (149 - _RAISED)


def row_loads(tile: MatmulTile, layout: Plan, accumulators: Sequence[str], begin: str, suffix: str = "") -> None:
    """Print what the turn that begins at ``begin`` reads of the weight, for each lane: words, and their groups' factors."""
    writer, how, packed = tile.writer, scheme(layout), packed_rows(layout)
    across, along = "[:, None]", "[None, :]"
    writer.line(f"word = ({begin}) // {how.places} + tl.arange(0, {packed.words})")
    if how.group:
        writer.line(f"eight = ({begin}) // {_eight(layout)} + tl.arange(0, {_eight_words(layout)})")
    for name, column in zip(accumulators, _columns(layout)):
        packed.print_words(writer, f"{name}_w{suffix}", column, "ok", across, along, STREAMED)
        if how.group:
            group = f"eight // {how.group // _eight(layout)}"
            packed.print_group_values(writer, f"{name}{suffix}", column, "ok", group, across, along)


def begin_row(tile: MatmulTile, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print the sums of one row before its loop: of eight words each, for each column and for the row itself."""
    for name in accumulators:
        tile.writer.line(f"{name}_sums = tl.zeros((BLOCK_N, {_eight_words(layout)}), tl.float32)")
    if not scheme(layout).group:
        tile.writer.line(f"row_sums = tl.zeros((1, {_eight_words(layout)}), tl.float32)")
    tile.begin_squares(packed_rows(layout).words)


def row_turn(tile: MatmulTile, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print a turn for one row, while what the next reads is on its way."""
    writer, how, packed = tile.writer, scheme(layout), packed_rows(layout)
    ahead = f"k0 + BLOCK_K < {layout.depth}"
    with writer.block(f"if {ahead}:"):
        row_loads(tile, layout, accumulators, "k0 + BLOCK_K", "_ahead")
    writer.line(f"word = k0 // {how.places} + tl.arange(0, {packed.words})")
    kind = "turn" if how.group else "sums"
    for place in range(how.places):
        tile.enter()
        packed.print_inputs(writer, place)
        value = print_rows(tile, layout)
        tile.add_squares()
        sign = "=" if how.group and place == 0 else "+="
        writer.line(f"row_{kind} {sign} {_eights(layout, '1', value)}")
        writer.line(f"scaled = {value} * {2.0 ** (_RAISED - how.bits * place)}")
        for name in accumulators:
            products = _eights(layout, "BLOCK_N", f"{packed.raw_codes_at(f'{name}_w', place)} * scaled")
            writer.line(f"{name}_{kind} {sign} {products}")
        tile.leave()
    if how.group:
        for name in accumulators:
            zeros = f"{name}_zeros" if how.zeros else str(how.middle)
            writer.line(f"{name}_sums += ({name}_turn * {_LOWERED} - row_turn * {zeros}) * {name}_factors")
    with writer.block(f"if {ahead}:"):
        for name in accumulators:
            for item in ("_w", *(["_factors"] if how.group else []), *(["_zeros"] if how.zeros else [])):
                own = f"{name}_w_ahead" if item == "_w" else f"{name}_ahead{item}"
                writer.line(f"{name}{item} = {own}")


def _eight(layout: Plan) -> int:
    """Codes in eight words."""
    return 8 * scheme(layout).places


def _eight_words(layout: Plan) -> str:
    """How many times eight words there are in ``BLOCK_K`` codes, as Triton text."""
    return f"BLOCK_K // {_eight(layout)}"


def _eights(layout: Plan, rows: str, value: str) -> str:
    """Sums of eight words each, which one thread has."""
    return f"tl.sum(tl.reshape({value}, ({rows}, {_eight_words(layout)}, 8)), 2)"


def end_row(tile: MatmulTile, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print the sums of each column."""
    middle = "" if scheme(layout).group else f" * {_LOWERED} - tl.sum(row_sums, 1) * {scheme(layout).middle}"
    for name in accumulators:
        tile.writer.line(f"{name} = (tl.sum({name}_sums, 1){middle})[None, :]")


def _columns(layout: Plan) -> list[str]:
    """The columns of each lane."""
    return [f"(n + {offset})" if offset else "n" for offset in layout.offsets]


def few_turn(tile: MatmulTile, layout: Plan, column: str, ok: str) -> None:
    """Print a turn for a few rows, with the weight as the left operand: the codes of a place are one operand."""
    writer = tile.writer

    def product(weight: str, rows: str, total: str) -> str:
        writer.line(f"w = {weight}.to({element(layout)})")
        writer.line(f"x = tl.trans({rows}.to({element(layout)}))")
        return f'tl.dot(w, x, {total}input_precision="ieee")'

    packed_rows(layout).print_turn(
        writer, [("acc", column)], ok, ("[:, None]", "[None, :]"), _rows_of(tile, layout), product, element(layout)
    )


def many_turn(tile: MatmulTile, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print a turn for many rows."""
    writer = tile.writer

    def product(weight: str, rows: str, total: str) -> str:
        writer.line(f"x = {rows}.to({element(layout)})")
        writer.line(f"w = {weight}.to({element(layout)})")
        return f'tl.dot(x, w, {total}input_precision="ieee")'

    sums = list(zip(accumulators, _columns(layout)))
    packed_rows(layout).print_turn(
        writer, sums, "ok", ("[None, :]", "[:, None]"), _rows_of(tile, layout), product, element(layout)
    )


def _rows_of(tile: MatmulTile, layout: Plan) -> Callable[[], AbstractContextManager[str]]:
    """Prints the rows of a place, which are unknown after it."""

    @contextmanager
    def rows() -> Iterator[str]:
        tile.enter()
        yield print_rows(tile, layout)
        tile.leave()

    return rows
