"""Kernels of rows: pointwise work, lookups and reductions over rows that one program holds whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..ir.cache_rounding import LARGEST, TRIES
from ..ir.dist import ranks_of
from ..ir.graph import Graph, flat_types, type_of
from ..ir.ops import op_name
from ..ir.tiles import TILE_LARGEST, sums_choices
from ..ir.types import Dim, Size
from .coordinates import TILE, flat_index, padded_width, strides_of
from .exchange import FEW_ROWS, MEETING, SENDING, UNSPECIALISED, meeting_of, sent_by
from .rank_rows import LINE_NAMES, print_line, print_send, received, sending_text, waits_itself
from .round_rows import row_absmax, store_codes
from .signature import file_text, kernel_text, parameters, pointer_types, print_begin, print_wait, types_text
from .tile import Position, Tile
from .writer import Writer

# Elements of a tile that each thread has, where there are so many; and where whole rows become codes of a byte, of which a
# thread writes 16 bytes at a time: 64 rows of 4,096 took 3.0 us with half as many, and 2.0 with these.
_OWN, _OWN_CODES = 16, 32


class RowTile(Tile):
    """A tile of whole rows: norms and reductions are sums over the columns at hand."""

    def __init__(self, graph: Graph, writer: Writer) -> None:
        super().__init__(graph, writer)
        self.statistics = self._row_statistics
        self._columns: dict[int, str] = {}
        self._found: dict[tuple[Node, str], tuple[str, str]] = {}
        self.widest = 1

    def columns(self, width: int) -> str:
        """The column coordinates ``0 .. width`` of a row, padded to a power of two."""
        padded = padded_width(width)
        self.widest = max(self.widest, padded)
        if padded not in self._columns:
            self._columns[padded] = self.writer.assign("col", f"tl.arange(0, {padded})[None, :]")
        return self._columns[padded]

    def _row(self, source_shape: tuple[Size, ...], at: Position) -> Position:
        """The whole row of a value of that shape that the position lies in."""
        width = source_shape[-1]
        assert isinstance(width, int)
        column = self.columns(width)
        return at.at((*at.coords[: len(source_shape) - 1], column), _below(column, width))

    def _row_statistics(self, node: Node, read: Callable[[Position], str], at: Position) -> tuple[str, str]:
        source = node.args[0]
        assert isinstance(source, Node)
        place = self._row(type_of(source).shape, at)
        width, eps = type_of(source).shape[-1], norm_epsilon(node)
        x = read(place)
        mean = ""
        if op_name(node.target) == "nn.layer_norm":
            mean = self.writer.assign("mean", f"tl.sum(tl.where({place.mask}, {x}, 0.0), 1)[:, None] / {width}")
            x = self.writer.assign("centred", f"{x} - {mean}")
        square = f"tl.sum(tl.where({place.mask}, {x} * {x}, 0.0), 1)[:, None] / {width}"
        return mean, self.writer.assign("inverse", f"1.0 / tl.sqrt({square} + {eps})")

    def largest(self, node: Node, which: int, at: Position) -> str:
        source, place = node.all_input_nodes[0], at.coords[-1]
        if (node, place) not in self._found:
            shape = type_of(source).shape
            x = self.value(source, self._row(shape, at))
            made = self.writer.fresh("values"), self.writer.fresh("columns")
            count = node.args[1] if op_name(node.target) == "aten.topk" else 1
            self.writer.line(f"{', '.join(made)} = top_of({x}, {_places(place)}, {shape[-1]}, {count})")
            self._found[node, place] = made
        return self._found[node, place][which]

    def _picked(self, node: Node, source: Node, at: Position) -> str:
        index = node.args[2]
        assert isinstance(index, Node)
        x = self.value(source, self._row(type_of(source).shape, at))
        count = type_of(index).shape[-1]
        return f"picked({x}, {self.value(index, at)}, {_places(at.coords[-1])}, {count})"

    def _reduction(self, node: Node, source: Node, name: str, at: Position) -> str:
        shape = type_of(source).shape
        if sums_choices(node):
            count = shape[-2]
            assert isinstance(count, int)
            parts = [self.value(source, at.at((*at.coords[:-1], str(index), at.coords[-1]))) for index in range(count)]
            return " + ".join(parts)
        if name == "aten.gather":
            return self._picked(node, source, at)
        place = self._row(shape, at)
        if name == "dist.receive":
            return received(self.graph, node)
        if name == "nn.absmax":
            return row_absmax(self, node, place)
        x = self.value(source, place)
        if name == "dist.all_reduce":
            print_send(self.writer, node, x, place.coords[-1], ranks_of(self.graph))
            return received(self.graph, node)
        if name == "aten.amax":
            return f'tl.max(tl.where({place.mask}, {x}, float("-inf")), 1)[:, None]'
        if name == "nn.head_factors":
            dtype = str(node.args[1])
            inside = self.writer.assign("inside", f"tl.where({place.mask}, {x}, 0.0)")
            return f"code_factor({inside}, {LARGEST[dtype]}, {dtype == 'i8'}, {TRIES[dtype]})"
        if name == "aten.softmax.int":
            largest = self.writer.assign("largest", f'tl.max(tl.where({place.mask}, {x}, float("-inf")), 1)[:, None]')
            power = self.writer.assign("power", f"tl.exp(tl.where({place.mask}, {x} - {largest}, 0.0))")
            total = self.writer.assign("total", f"tl.sum(tl.where({place.mask}, {power}, 0.0), 1)[:, None]")
            here = self.value(source, at)
            return f"tl.exp({here} - {largest}) / {total}"
        total = f"tl.sum(tl.where({place.mask}, {x}, 0.0), 1)[:, None]"
        return f"{total} / {shape[-1]}" if name == "aten.mean.dim" else total


def _places(column: str) -> str:
    """Coordinates of columns as a tile, where there is a single column, too."""
    return "tl.zeros((1, 1), tl.int32)" if column == "0" else column


def _below(column: str, width: int) -> str:
    """The mask of a row padded to a power of two; none is needed where the width is one."""
    return "" if padded_width(width) == width else f"({column} < {width})"


def norm_epsilon(node: Node) -> str:
    """The epsilon argument of a norm."""
    return repr(node.args[-1])


def rows_source(graph: Graph) -> str:
    """The file of a kernel of rows, without its header."""
    sends = sent_by(graph)
    kernel, launch = rows_kernel(graph, "launch_rows" if sends else "launch")
    if sends:
        names = ", ".join(parameters(graph))
        rows = f"{sends.all_input_nodes[0].name}.shape[0]"
        launch = f"{sending_text(sends)}{launch}\n\ndef launch({names}, ranks=None):\n"
        launch += f"    launch_rows({names}, sending(ranks, {rows}))\n"
    return file_text(
        [kernel], f"{launch}\n\n# Every specialisation that launch may use.\nVARIANTS = [{graph.name.upper()}]\n"
    )


def rows_kernel(graph: Graph, function: str) -> tuple[str, str]:
    """A kernel of rows, and the host's part: its one variant, and the function that launches it.

    Where ranks meet, that function takes the exchange, too, and returns whether the rows may meet in a kernel. What is sent
    goes out if its last argument ``to_ranks`` says so.
    """
    outputs: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    results = [value_written(node) for node in outputs]
    lead = leading(type_of(results[0]).shape)
    names = parameters(graph)
    meeting, sends = meeting_of(graph), sent_by(graph)
    more = MEETING if meeting else SENDING if sends else {}
    writer = Writer({node.name for node in graph.nodes} | set(names) | {"num_rows", "row_ok", *more, *LINE_NAMES})
    writer.line("row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)")
    writer.line("row_ok = row < num_rows")
    tile = RowTile(graph, writer)
    inner = list(lead[1:])
    coords = _split_row(writer, inner)
    tile.row_names |= set(coords)

    def place_of(result: Node) -> Position:
        shape = type_of(result).shape
        if isinstance(shape[-1], Dim):
            return Position(coords[: len(shape)], "row_ok")
        column = tile.columns(shape[-1])
        return Position((*coords, column), "row_ok", _below(column, shape[-1]))

    awaits = waits_itself(meeting)
    print_begin(writer, wait=not awaits)
    if meeting:
        print_line(writer, "row", "row_ok", 0 if awaits else ranks_of(graph))
        tile.value(meeting, place_of(meeting))
        if awaits:  # it needs nothing else of the kernel in front
            print_wait(writer)
    elif sends:
        with writer.block("if SEND:"):
            print_line(writer, "row", "row_ok", ranks_of(graph))
    for output, result in zip(outputs, results):
        store(tile, output, result, place_of(result))
    alone = any(op_name(node.target) in TILE_LARGEST | {"aten.gather"} for node in graph.calls())
    # A row in which columns are found has a warp to itself: each number found is a sum or two over it, which take ten times
    # as long where warps have to meet. Of 128 columns the largest 8 took 2.2 us, and 6.1 in tiles of 16 rows.
    block = 1 if alone else padded_width(max(1, min(32, TILE // (tile.widest * len(outputs)))))
    # Few rows are not many programs: more threads for each make them short.
    rounds = any(op_name(result.target) == "nn.quantize" for result in results)
    own, most = (_OWN_CODES if rounds else _OWN, 16)
    if meeting:  # what waits for others has little else to do
        own, most = _OWN // 2, 32
    warps = 1 if alone else max(4, min(most, block * tile.widest // (32 * own)))
    rows = (
        f"{results[0].name}.numel() // {_width(type_of(results[0]).stored.shape)}"
        if outputs[0] is results[0]
        else _rows_of(results[0], graph)
    )
    constants = ["BLOCK_ROWS: tl.constexpr", *(["SEND: tl.constexpr"] if sends else []), "PDL: tl.constexpr"]
    arguments = ", ".join([*(f"{name}_ptr" for name in names), "num_rows", *more, *constants])
    types = {**pointer_types(graph), "num_rows": "i32", **more}
    given = ', "SEND": True' if sends else ""
    variant = f"""\
{graph.name.upper()} = {{
    "kernel": {graph.name}_kernel, "signature": {types_text(types)},
    "constexprs": {{"BLOCK_ROWS": {block}{given}, "PDL": False}}, "num_warps": {warps}, "num_stages": 1,
}}


"""
    last = ", ranks" if meeting else ", to_ranks" if sends else ""
    launch = [f"def {function}({', '.join(names)}{last}):", f"    num_rows = {rows}"]
    if meeting:
        size = type_of(meeting).shape[-1]
        assert isinstance(size, int)
        width = padded_width(size)  # as whoever sends it counts
        few = f"num_rows > {FEW_ROWS} or " if awaits else ""
        launch += [f"    if {few}not ranks.takes(num_rows, {width}, {meeting.all_input_nodes[0].name}.nbytes):"]
        launch += ["        return False"]
        launch += [] if awaits else ["    ranks.next()"]
    how = ", **ranks.meeting" if meeting else ", **to_ranks" if sends else ""
    launch += ["    if num_rows:"]
    launch += [
        f"        run({graph.name.upper()}, (triton.cdiv(num_rows, {block}),), {', '.join(names)}, num_rows{how})"
    ]
    launch += ["    return True"] if meeting else []
    unspecialised = ["num_rows", *(UNSPECIALISED if more else [])]
    host = variant + "\n".join(launch) + "\n"
    return kernel_text(f"{graph.name}_kernel", arguments, writer.text(), unspecialised), host


def leading(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The dims that make up the rows: all but the last, unless the last one is dynamic."""
    return shape if isinstance(shape[-1], Dim) else shape[:-1]


def _width(shape: tuple[Size, ...]) -> int:
    return 1 if isinstance(shape[-1], Dim) else shape[-1]


def _rows_of(result: Node, graph: Graph) -> str:
    """The number of rows of a value that is not a parameter of the kernel: from an input with the same first dim."""
    shape = type_of(result).shape
    inner = 1
    for size in leading(shape)[1:]:
        inner *= size if isinstance(size, int) else 1
    for node in graph.inputs():
        if flat_types(node.meta["type"])[0].shape[:1] == shape[:1]:
            return f"{node.name}.shape[0] * {inner}"
    raise AssertionError("a kernel of rows reads rows")


def _split_row(writer: Writer, inner: list[Any]) -> tuple[str, ...]:
    if not inner:
        return ("row",)
    strides = strides_of(inner)
    step = strides[0] * inner[0]
    coords = [writer.assign("token", f"row // {step}")]
    for size, stride in zip(inner, strides):
        coords.append(writer.assign("part", f"(row // {stride}) % {size}" if stride > 1 else f"row % {size}"))
    return tuple(coords)


def value_written(node: Node) -> Node:
    """What a result is made of: for a cache write the rows written, else the value itself."""
    if op_name(node.target) == "nn.cache_write":
        rows = node.args[1]
        assert isinstance(rows, Node)
        return rows
    return node


def store(tile: Tile, output: Node, result: Node, at: Position) -> None:
    """Write a result to memory: to its own tensor, or to the slots of a cache."""
    if op_name(result.target) == "nn.quantize":
        store_codes(tile, output, at)
        return
    value = tile.value(result, at)
    if op_name(output.target) == "dist.send":
        with tile.writer.block("if SEND:"):
            print_send(tile.writer, output, value, at.coords[-1], ranks_of(tile.graph))
        with tile.writer.block("else:"):
            place = flat_index(at.coords, type_of(output).shape)
            tile.writer.line(f"tl.store({output.name}_ptr + {place}, {value}, mask={at.mask})")
        return
    coords, target = at.coords, output
    if output is not result:
        cache, _, slots = output.args
        assert isinstance(cache, Node) and isinstance(slots, Node)
        coords, target = (tile.looked_up(slots, coords[:1], at), *coords[1:]), cache
    shape = type_of(target).shape
    where = flat_index(coords, shape)
    if shape[-1] == 1 and coords[-1] != where:
        where = f"{where} + {coords[-1]}"  # zero under the mask: the pointers need the shape of the tile
    tile.writer.line(f"tl.store({target.name}_ptr + {where}, {value}, mask={at.mask})")
