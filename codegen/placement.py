"""Which columns a program of a matmul computes, as lines of its kernel."""

from __future__ import annotations

from .columns import Plan, Section
from .writer import Writer


def tile_count(layout: Plan, block_n: str) -> str:
    """The number of tiles over all columns, as Python text."""
    if layout.head_dim:
        return f"{layout.width // layout.head_dim} * triton.cdiv({layout.head_dim}, {block_n})"
    return " + ".join(f"triton.cdiv({section.width}, {block_n})" for section in layout.sections)


def place_columns(writer: Writer, layout: Plan) -> list[str]:
    """Print the columns of program ``tile``; returns the first tile of each section, as text.

    ``cols`` are columns of a head or of a tile, ``n`` those of the weight, and ``ok`` is the mask of both; ``lane``,
    ``col`` and ``n_ok`` are the same as a row.
    """
    writer.line("lanes = tl.arange(0, BLOCK_N)")
    firsts = _place_in_head(writer, layout) if layout.head_dim else _place_in_section(writer, layout)
    writer.line("lane, col, n_ok = lanes[None, :], cols[None, :], ok[None, :]")
    return firsts


def _place_in_head(writer: Writer, layout: Plan) -> list[str]:
    width = layout.head_dim
    assert width is not None
    writer.line(f"parts = ({width} + BLOCK_N - 1) // BLOCK_N")
    writer.line("part = tile % parts")
    writer.line("tile = tile // parts")
    if layout.order == "neighbours":
        writer.line("cols = part * BLOCK_N + lanes")
    else:
        half = layout.rotary // 2
        writer.line("# A tile holds both columns of each pair that is rotated.")
        writer.line("pair = part * (BLOCK_N // 2) + lanes % (BLOCK_N // 2)")
        writer.line("upper = lanes // (BLOCK_N // 2)")
        cols = f"pair + upper * {half}"
        if layout.rotary < width:
            cols = f"tl.where(pair < {half}, {cols}, 2 * pair + upper)"
        writer.line(f"cols = {cols}")
    writer.line(f"ok = {f'pair < {width // 2}' if layout.order == 'halves' else f'cols < {width}'}")
    firsts, count = [], 0
    for section in layout.sections:
        firsts.append(str(count))
        count += section.width // width
    # int64, since a row of a large vocabulary lies more than 2**31 elements into the weight
    writer.line(f"n = ({_start(layout, firsts, str(width))} + cols).to(tl.int64)")
    return firsts


def _place_in_section(writer: Writer, layout: Plan) -> list[str]:
    writer.line("cols = lanes")
    firsts, total = [], "0"
    for section in layout.sections:
        firsts.append(total)
        count = f"(({section.width} + BLOCK_N - 1) // BLOCK_N)"
        total = count if total == "0" else f"{total} + {count}"
    writer.line(f"start = {_start(layout, firsts, 'BLOCK_N')}")
    writer.line("n = (start + cols).to(tl.int64)")
    if len(layout.sections) == 1:
        writer.line(f"ok = tile * BLOCK_N + cols < {layout.sections[0].width}")
    else:
        bound = _chosen(layout, firsts, [str(item.starts[0] + item.width) for item in layout.sections])
        writer.line(f"ok = start + cols < {bound}")
    return firsts


def _start(layout: Plan, firsts: list[str], step: str) -> str:
    """The column of the weight that a tile begins at."""
    starts = [section.starts[0] for section in layout.sections]
    packed = all(begin == sum(item.width for item in layout.sections[:index]) for index, begin in enumerate(starts))
    if packed and (layout.head_dim or len(starts) == 1):
        return f"tile * {step}"
    texts = []
    for first, begin in zip(firsts, starts):
        local = "tile" if first == "0" else f"(tile - ({first}))"
        texts.append(f"{begin} + {local} * {step}")
    return _chosen(layout, firsts, texts)


def _chosen(layout: Plan, firsts: list[str], texts: list[str]) -> str:
    """The text of the section that the tile lies in."""
    chosen = texts[0]
    for first, text in zip(firsts[1:], texts[1:]):
        chosen = f"tl.where(tile >= {first}, {text}, {chosen})"
    return chosen


def section_condition(firsts: list[str], index: int) -> str:
    """Whether the tile lies in a section."""
    first = firsts[index]
    if index == len(firsts) - 1:
        return f"tile >= {first}"
    until = firsts[index + 1]
    return f"tile < {until}" if first == "0" else f"(tile >= {first}) & (tile < {until})"


def local_tile(section: Section, first: str) -> str:
    """The number of the tile within its section."""
    return "tile" if first == "0" else f"(tile - {first if first.isdigit() else f'({first})'})"
