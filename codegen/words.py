"""Turns of a matmul's loop over the depth where the weight is quantised: words of codes, one place of them at a time."""

from __future__ import annotations

from collections.abc import Sequence

from .columns import Plan
from .matmul_loop import print_rows
from .matmul_tile import MatmulTile
from .weights import (
    codes_at,
    element,
    group_values,
    numbers_at,
    print_group_values,
    print_inputs,
    print_words,
    scheme,
    words_of,
)


def row_sums(layout: Plan) -> str:
    """How many sums one row has for each column, as Triton text: of blocks if groups have factors."""
    return f"BLOCK_K // {scheme(layout).block}" if scheme(layout).group else words_of(layout)


def row_turn(tile: MatmulTile, layout: Plan, accumulators: Sequence[str], more: str) -> None:
    """Print a turn for one row. Groups have their products summed by blocks of codes before the factors."""
    writer, how = tile.writer, scheme(layout)
    writer.line(f"word = k0 // {how.places} + tl.arange(0, {words_of(layout)})")
    with writer.block("if k0 > 0:"):
        row_words(tile, layout, accumulators, more)
    sums = [f"{name}_{'turn' if how.group else 'sums'}" for name in accumulators]
    for place in range(how.places):
        tile.enter()
        print_inputs(writer, layout, place)
        value = print_rows(tile, layout)
        tile.add_squares()
        sign = "=" if how.group and place == 0 else "+="
        for name, total in zip(accumulators, sums):
            writer.line(f"{total} {sign} {codes_at(layout, f'{name}_w', place)} * {value}")
        if how.zeros:
            writer.line(f"row_turn {sign} {value}")
        tile.leave()
    if not how.group:
        return
    count = row_sums(layout)
    writer.line(f"block = k0 // {how.block} + tl.arange(0, {count})")
    for name, column in zip(accumulators, columns_of(layout)):
        factors, zeros = group_values(layout, column, "ok", "block", "[:, None]", "[None, :]")
        blocks = f"tl.sum(tl.reshape({name}_turn, (BLOCK_N, {count}, 8)), 2)"
        if zeros:
            blocks = f"({blocks} - tl.sum(tl.reshape(row_turn, (1, {count}, 8)), 2) * {zeros})"
        writer.line(f"{name}_sums += {blocks} * {factors}")


def row_words(tile: MatmulTile, layout: Plan, accumulators: Sequence[str], more: str) -> None:
    """Print the words of one row's turn, for each lane."""
    for name, column in zip(accumulators, columns_of(layout)):
        print_words(tile.writer, layout, f"{name}_w", column, "ok", "[:, None]", "[None, :]", more)


def columns_of(layout: Plan) -> list[str]:
    """The columns of each lane."""
    return [f"(n + {offset})" if offset else "n" for offset in layout.offsets]


def few_turn(tile: MatmulTile, layout: Plan, column: str, ok: str) -> None:
    """Print a turn for a few rows, with the weight as the left operand: the codes of a place are one operand."""
    writer, across, along = tile.writer, "[:, None]", "[None, :]"
    writer.line(f"word = k0 // {scheme(layout).places} + tl.arange(0, {words_of(layout)})")
    print_words(writer, layout, "words", column, ok, across, along)
    print_group_values(writer, layout, column, ok, across, along)
    for place in range(scheme(layout).places):
        tile.enter()
        print_inputs(writer, layout, place)
        rows = print_rows(tile, layout)
        writer.line(f"w = {numbers_at(layout, 'words', place)}")
        writer.line(f"x = tl.trans({rows}.to({element(layout)}))")
        writer.line('acc = tl.dot(w, x, acc, input_precision="ieee")')
        tile.leave()


def many_turn(tile: MatmulTile, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print a turn for many rows."""
    writer, across, along = tile.writer, "[None, :]", "[:, None]"
    writer.line(f"word = k0 // {scheme(layout).places} + tl.arange(0, {words_of(layout)})")
    for name, column in zip(accumulators, columns_of(layout)):
        print_words(writer, layout, "words", column, "ok", across, along)
        print_group_values(writer, layout, column, "ok", across, along)
        for place in range(scheme(layout).places):
            tile.enter()
            print_inputs(writer, layout, place)
            writer.line(f"x = {print_rows(tile, layout)}.to({element(layout)})")
            writer.line(f"w = {numbers_at(layout, 'words', place)}")
            writer.line(f'{name} = tl.dot(x, w, {name}, input_precision="ieee")')
            tile.leave()
