"""A tile of a matmul: the rows that feed the product, and the work on its result."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from .columns import Plan, Section
from .placement import local_tile, section_condition
from .rows import norm_epsilon, store, value_written
from .tile import Position, Tile
from .weights import has_column_factors, in_codes
from .writer import Writer

NORMS = ("nn.rms_norm", "nn.layer_norm")


class MatmulTile(Tile):
    """A tile of a matmul: rows by a block of columns, or by columns of one head.

    ``k_loop`` opens a loop over the columns of the rows, ``block_m`` is the number of rows as Triton text.
    """

    def __init__(self, graph: Graph, writer: Writer, layout: Plan, k_loop: str, block_m: str) -> None:
        super().__init__(graph, writer)
        self.statistics = self._loop_statistics
        self.scalars |= {"tile", "head", "BLOCK_N"}
        self.row_mask = "" if block_m == "1" else "row_ok"
        self.folded: Node | None = None
        self._layout = layout
        self._k_loop = k_loop
        self._depth = layout.depth
        self._block_m = block_m
        self._found: dict[Node, tuple[str, str]] = {}

    @property
    def at_k(self) -> Position:
        """Where the rows are read in the loop over ``k``."""
        return Position(("row", "k[None, :]"), self.row_mask, f"(k < {self._depth})[None, :]")

    def _loop_statistics(self, node: Node, read: Callable[[Position], str], at: Position) -> tuple[str, str]:
        return self._found[node]

    def prepare_norms(self) -> None:
        """Print what the norms before the product need before its loop.

        An RMS norm right in front of the product needs nothing: its deviation is one factor for a whole row, found in
        the same loop and applied to the result.
        """
        for node in self.graph.calls():
            if node is self._layout.anchor:
                return
            if op_name(node.target) not in NORMS:
                continue
            if node is self._layout.anchor.args[0] and op_name(node.target) == "nn.rms_norm":
                self.folded = node
                self._found[node] = ("", "")
            else:
                self._found[node] = self._prepare(node)

    def _prepare(self, node: Node) -> tuple[str, str]:
        """Print the loops over ``k`` that find a norm's mean and deviation."""
        source = node.args[0]
        assert isinstance(source, Node)
        mean = ""
        centre = ""
        if op_name(node.target) == "nn.layer_norm":
            total = self._sum(source, lambda x: x, "")
            mean = self.writer.assign("mean", f"{total}[:, None] / {self._depth}")
            centre = mean
        squares = self._sum(source, lambda x: f"{x} * {x}", centre)
        return mean, self.writer.assign(
            "inverse", f"1.0 / tl.sqrt({squares}[:, None] / {self._depth} + {norm_epsilon(node)})"
        )

    def _sum(self, source: Node, function: Callable[[str], str], centre: str) -> str:
        total = self.writer.assign("total", f"tl.zeros(({self._block_m},), tl.float32)")
        with self.writer.block(self._k_loop):
            self.enter()
            self.writer.line("k = k0 + tl.arange(0, BLOCK_K)")
            x = self.value(source, self.at_k)
            if centre:
                x = self.writer.assign("centred", f"tl.where({self.at_k.mask}, {x} - {centre}, 0.0)")
            self.writer.line(f"{total} += tl.sum({function(x)}, 1)")
            self.leave()
        return total

    def begin_squares(self, width: str = "BLOCK_K") -> None:
        """Print the sums of the folded norm before the loop of the product, which reads ``width`` columns at a time."""
        if self.folded is not None:
            self.writer.line(f"squares = tl.zeros((1, {width}), tl.float32)")

    def add_squares(self) -> None:
        """Print what the folded norm adds up in the loop of the product."""
        if self.folded is not None:
            source = self.folded.args[0]
            assert isinstance(source, Node)
            x = self.value(source, self.at_k)
            self.writer.line(f"squares += {x} * {x}")

    def scale_by_norm(self, accumulators: list[str]) -> None:
        """Print the folded norm's factor and apply it to the product."""
        if self.folded is not None:
            total = f"tl.sum(squares, 1)[:, None] / {self._depth}"
            self.writer.line(f"inverse = 1.0 / tl.sqrt({total} + {norm_epsilon(self.folded)})")
            for name in accumulators:
                self.writer.line(f"{name} *= inverse")

    def rotated_partner(self, here: str) -> str:
        """The other value of each pair: it is in registers of other threads."""
        index = "lane ^ (BLOCK_N // 2)" if self._layout.order == "halves" else "lane ^ 1"
        wide = f"tl.broadcast_to({index}, {here}.shape[0], {here}.shape[1])"
        return self.writer.assign("turned", f"tl.gather({here}, {wide}, 1)")

    def finish(self, accumulators: list[str], tiles: list[str]) -> None:
        """Print the work on the product. ``tiles`` are the first tiles of the sections."""
        layout = self._layout
        self.scale_by_norm(accumulators)
        if has_column_factors(layout):
            for name in accumulators:
                self.writer.line(f"{name} *= {name}_factors")
        if in_codes(layout):
            for name in accumulators:
                self.writer.line(f"{name} *= row_factors")
        bias = layout.anchor.args[2] if len(layout.anchor.args) > 2 else None
        if isinstance(bias, Node):
            for offset, name in zip(layout.offsets, accumulators):
                where = f"n[None, :] + {offset}" if offset else "n[None, :]"
                self.writer.line(f"{name} += tl.load({bias.name}_ptr + {where}, mask=n_ok, other=0).to(tl.float32)")
        for index, section in enumerate(layout.sections):
            if not section.outputs:
                continue
            if len(layout.sections) == 1:
                self._finish_section(section, accumulators, "tile")
                continue
            self.writer.line(f"# {', '.join(lane.name for lane in section.lanes)}")
            with self.writer.block(f"if {section_condition(tiles, index)}:"):
                self.enter()
                self._finish_section(section, accumulators, local_tile(section, tiles[index]))
                self.leave()

    def _finish_section(self, section: Section, accumulators: list[str], local: str) -> None:
        head_dim, head = self._layout.head_dim, local
        if head_dim:
            head = self.writer.assign("head", local) if local != "tile" else "tile"
            self.scalars.add(head)
        by_column = not head_dim or any(type_of(value_written(node)).rank == 2 for node in section.outputs)
        column = self.writer.assign("out_col", f"{local} * {head_dim or 'BLOCK_N'} + col") if by_column else ""

        def home(node: Node) -> Position:
            if type_of(node).rank == 3:
                return Position(("row", head, "col"), self.row_mask, "n_ok")
            return Position(("row", column or f"{head} * {head_dim} + col"), self.row_mask, "n_ok")

        self.given = dict(zip(section.lanes, accumulators))
        self.home = home
        for output in section.outputs:
            result = value_written(output)
            store(self, output, result, home(result))
        self.home = None
        self.given = {}
