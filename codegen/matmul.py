"""Kernels around one matmul: the norm before it, the product, and the work on its result, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from .columns import Plan, Section, plan
from .rows import norm_epsilon, padded_width, store, value_written
from .signature import Variant, file_text, parameters, pointer_types
from .tile import Position, Tile
from .writer import Writer

_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


class MatmulTile(Tile):
    """A tile of a matmul: rows by a block of columns, or by one head."""

    def __init__(self, graph: Graph, writer: Writer, k_loop: str, depth: int) -> None:
        super().__init__(graph, writer)
        self.statistics = self._loop_statistics
        self._k_loop = k_loop
        self._depth = depth
        self._found: dict[Node, tuple[str, str]] = {}

    def _loop_statistics(self, node: Node, read: Callable[[Position], str], at: Position) -> tuple[str, str]:
        if self.home is not None:
            return self._head_statistics(node, read, at)
        return self._found[node]

    def prepare_norm(self, node: Node) -> None:
        """Print the loops over ``K`` that find a norm's mean and deviation, before the loop of the product."""
        source = node.args[0]
        assert isinstance(source, Node)
        mean = ""
        centre = ""
        if op_name(node.target) == "nn.layer_norm":
            total = self._sum(source, lambda x: x, "")
            mean = self.writer.assign("mean", f"{total}[:, None] / {self._depth}")
            centre = mean
        squares = self._sum(source, lambda x: f"{x} * {x}", centre)
        inverse = self.writer.assign(
            "inverse", f"1.0 / tl.sqrt({squares}[:, None] / {self._depth} + {norm_epsilon(node)})"
        )
        self._found[node] = (mean, inverse)

    def _sum(self, source: Node, function: Callable[[str], str], centre: str) -> str:
        total = self.writer.assign("total", "tl.zeros((BLOCK_M,), tl.float32)")
        with self.writer.block(self._k_loop):
            self.enter()
            self.writer.line("k = k0 + tl.arange(0, BLOCK_K)")
            at = Position(("row", "k[None, :]"), "row_ok", f"(k < {self._depth})[None, :]")
            x = self.value(source, at)
            if centre:
                x = self.writer.assign("centred", f"tl.where({at.mask}, {x} - {centre}, 0.0)")
            self.writer.line(f"{total} += tl.sum({function(x)}, 1)")
            self.leave()
        return total

    def _head_statistics(self, node: Node, read: Callable[[Position], str], at: Position) -> tuple[str, str]:
        """The statistics of a norm over a head, which the tile holds whole."""
        source = node.args[0]
        assert isinstance(source, Node)
        x, width, mean = read(at), type_of(source).shape[-1], ""
        if op_name(node.target) == "nn.layer_norm":
            mean = self.writer.assign("mean", f"tl.sum(tl.where(n_ok, {x}, 0.0), 1)[:, None] / {width}")
            x = self.writer.assign("centred", f"{x} - {mean}")
        total = f"tl.sum(tl.where(n_ok, {x} * {x}, 0.0), 1)[:, None] / {width}"
        return mean, self.writer.assign("inverse", f"1.0 / tl.sqrt({total} + {norm_epsilon(node)})")


def matmul_source(graph: Graph) -> str:
    """The file of a kernel around one matmul, without its header."""
    layout = plan(graph)
    anchor = layout.anchor
    x, weight = anchor.args[:2]
    bias = anchor.args[2] if len(anchor.args) > 2 else None
    assert isinstance(x, Node) and isinstance(weight, Node)
    depth, columns = type_of(weight).shape[1], type_of(weight).shape[0]
    assert isinstance(depth, int) and isinstance(columns, int)
    lanes = len(layout.sections[0].lanes)
    names = parameters(graph)
    writer = Writer(
        {node.name for node in graph.nodes} | set(names) | {"num_rows", "row_ok", "n_ok", "k", "k0", "n", "w", "x"}
    )
    loop = f"for k0 in range(0, {depth}, BLOCK_K):"
    tile = MatmulTile(graph, writer, loop, depth)
    tile.scalars |= {"tile", "BLOCK_N"}
    writer.line("# Column tiles vary fastest: programs that run together share the rows, and read the weight once.")
    writer.line("row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)")
    writer.line("row_ok = row < num_rows")
    writer.line("tile = tl.program_id(0)")
    tiles = _place_columns(writer, layout)
    for node in graph.calls():
        if op_name(node.target) == "aten.index_select":
            tile.looked_up(node.args[2], ("row",), Position(("row",), "row_ok"))  # type: ignore[arg-type]
    for node in graph.calls():
        if node is anchor:
            break
        if op_name(node.target) in ("nn.rms_norm", "nn.layer_norm"):
            tile.prepare_norm(node)
    accumulators = [f"acc{lane}" if lanes > 1 else "acc" for lane in range(lanes)]
    for name in accumulators:
        writer.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
    with writer.block(loop):
        tile.enter()
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        value = tile.value(x, Position(("row", "k[None, :]"), "row_ok", f"(k < {depth})[None, :]"))
        if any(op_name(node.target) == "nn.layer_norm" for node in _before(graph, anchor)):
            value = writer.assign("masked", f"tl.where((k < {depth})[None, :], {value}, 0.0)")
        writer.line(f"x = {value}.to({weight.name}_ptr.dtype.element_ty)")
        for lane, name in enumerate(accumulators):
            offset = layout.sections[0].starts[lane] - layout.sections[0].starts[0]
            n = f"(n + {offset})" if offset else "n"
            writer.line(
                f"w = tl.load({weight.name}_ptr + {n}[None, :] * {depth} + k[:, None], "
                f"mask=n_ok & (k < {depth})[:, None], other=0)"
            )
            writer.line(f'{name} = tl.dot(x, w, {name}, input_precision="ieee")')
        tile.leave()
    if isinstance(bias, Node):
        for lane, name in enumerate(accumulators):
            offset = layout.sections[0].starts[lane] - layout.sections[0].starts[0]
            writer.line(f"{name} += tl.load({bias.name}_ptr + n + {offset}, mask=n_ok, other=0).to(tl.float32)")
    _epilogues(tile, layout, accumulators, tiles)
    return file_text(
        graph,
        ", ".join([*(f"{name}_ptr" for name in names), "num_rows", *(f"{name}: tl.constexpr" for name in _BLOCKS)]),
        writer.text(),
        *_launcher(graph, layout, names, lanes),
    )


def _before(graph: Graph, anchor: Node) -> list[Node]:
    return [node for node in graph.calls() if node < anchor]


def _place_columns(writer: Writer, layout: Plan) -> list[str]:
    """Print which columns the program computes; returns the first tile of each section, as text."""
    writer.line("col = tl.arange(0, BLOCK_N)[None, :]")
    step = str(layout.head_dim) if layout.head_dim else "BLOCK_N"
    counts = [
        str(section.width // layout.head_dim) if layout.head_dim else f"(({section.width} + BLOCK_N - 1) // BLOCK_N)"
        for section in layout.sections
    ]
    firsts, total = [], "0"
    for count in counts:
        firsts.append(total)
        total = count if total == "0" else f"{total} + {count}"
    if layout.head_dim:
        firsts = [str(sum(map(int, counts[:index]))) for index in range(len(counts))]
    start = f"tile * {step}"
    if len(layout.sections) > 1:
        starts = [section.starts[0] for section in layout.sections]
        packed = layout.head_dim and all(
            begin == sum(section.width for section in layout.sections[:index]) for index, begin in enumerate(starts)
        )
        if not packed:
            start = f"{starts[0]} + tile * {step}"
            for first, begin in zip(firsts[1:], starts[1:]):
                start = f"tl.where(tile >= {first}, {begin} + (tile - ({first})) * {step}, {start})"
    elif layout.sections[0].starts[0]:
        start = f"{layout.sections[0].starts[0]} + {start}"
    writer.line(f"start = {start}")
    # int64, since a row of a large vocabulary lies more than 2**31 elements into the weight
    writer.line("n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)")
    if layout.head_dim:
        writer.line(f"n_ok = col < {layout.head_dim}")
    elif len(layout.sections) == 1:
        writer.line(f"n_ok = (tile * BLOCK_N + col) < {layout.sections[0].width}")
    else:
        bound = str(layout.sections[0].starts[0] + layout.sections[0].width)
        for first, section in zip(firsts[1:], layout.sections[1:]):
            bound = f"tl.where(tile >= {first}, {section.starts[0] + section.width}, {bound})"
        writer.line(f"n_ok = (start + col) < {bound}")
    return firsts


def _epilogues(tile: MatmulTile, layout: Plan, accumulators: list[str], tiles: list[str]) -> None:
    writer = tile.writer
    for index, (section, first) in enumerate(zip(layout.sections, tiles)):
        if not section.outputs:
            continue
        if len(layout.sections) == 1:
            _epilogue(tile, layout, section, accumulators, "tile")
        else:
            last = index == len(layout.sections) - 1
            until = tiles[index + 1] if not last else ""
            condition = (
                f"tile >= {first}"
                if last
                else f"tile < {until}"
                if first == "0"
                else f"(tile >= {first}) & (tile < {until})"
            )
            writer.line(f"# {', '.join(lane.name for lane in section.lanes)}")
            with writer.block(f"if {condition}:"):
                tile.enter()
                _epilogue(
                    tile,
                    layout,
                    section,
                    accumulators,
                    f"(tile - {first if first.isdigit() else f'({first})'})" if first != "0" else "tile",
                )
                tile.leave()


def _epilogue(tile: MatmulTile, layout: Plan, section: Section, accumulators: list[str], local: str) -> None:
    writer = tile.writer
    head = local
    if layout.head_dim:
        head = writer.assign("head", local) if local != "tile" else "tile"
        tile.scalars.add(head)
    needs_column = not layout.head_dim or any(type_of(value_written(node)).rank == 2 for node in section.outputs)
    column = writer.assign("out_col", f"{local} * {layout.head_dim or 'BLOCK_N'} + col") if needs_column else ""

    def home(node: Node) -> Position:
        if type_of(node).rank == 3:
            return Position(("row", head, "col"), "row_ok", "n_ok")
        return Position(("row", column or f"{head} * {layout.head_dim} + col"), "row_ok", "n_ok")

    tile.given = dict(zip(section.lanes, accumulators))
    tile.home = home
    for output in section.outputs:
        result = value_written(output)
        store(tile, output, result, home(result))
    tile.home = None
    tile.given = {}


def _launcher(graph: Graph, layout: Plan, names: list[str], lanes: int) -> tuple[list[str], list[Variant]]:
    """Small row blocks for decode, large ones for prefill."""
    weight = layout.anchor.args[1]
    assert isinstance(weight, Node)
    wide = type_of(weight).torch_dtype.itemsize > 2
    if layout.head_dim:
        block_n = max(16, padded_width(layout.head_dim))
        small_n = large_n = block_n
    else:
        small_n, large_n = 32, 128 // lanes
    small = {"BLOCK_M": 16, "BLOCK_N": small_n, "BLOCK_K": (64 if small_n > 64 else 128) // (2 if wide else 1)}
    large = {"BLOCK_M": 32 if wide else 64, "BLOCK_N": large_n, "BLOCK_K": 32 if wide or large_n > 128 else 64}
    warps = {"small": 4, "large": 8 if wide or large_n >= 128 else 4}
    rows_of = _row_input(graph, layout.anchor)
    total = (
        str(sum(section.width for section in layout.sections) // layout.head_dim)
        if layout.head_dim
        else " + ".join(f"triton.cdiv({section.width}, blocks['BLOCK_N'])" for section in layout.sections)
    )
    arguments = ", ".join(names)
    launch = [
        f"def launch({arguments}):",
        f"    num_rows = {rows_of}.shape[0]",
        "    if num_rows == 0:",
        "        return",
        "    # Decode has few rows: narrow tiles spread the weights over all processors.",
        f"    if num_rows <= {small['BLOCK_M']}:",
        f"        blocks, warps, stages = {small}, {warps['small']}, 3",
        "    else:",
        f"        blocks, warps, stages = {large}, {warps['large']}, 2",
        f"    grid = ({total}, triton.cdiv(num_rows, blocks['BLOCK_M']))",
        f"    {graph.name}_kernel[grid](",
        f"        {arguments}, num_rows, **blocks, num_warps=warps, num_stages=stages",
        "    )",
    ]
    signature = {**pointer_types(graph), "num_rows": "i32"}
    return launch, [(signature, small, warps["small"], 3), (signature, large, warps["large"], 2)]


def _row_input(graph: Graph, anchor: Node) -> str:
    """An input or result whose first dim is the number of rows."""
    rows = type_of(anchor).shape[0]
    for node in graph.inputs():
        if type_of(node).shape[:1] == (rows,):
            return node.name
    raise AssertionError("a matmul reads rows")
