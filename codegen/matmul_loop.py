"""What the bodies of a matmul have in common: how they begin, and what they read in the loop over the depth."""

from __future__ import annotations

from torch.fx import Node

from ..ir.dist import ranks_of
from ..ir.graph import Graph
from ..ir.ops import op_name
from .codes import row_codes
from .columns import Plan
from .exchange import SENDING, sent_by
from .matmul_tile import MatmulTile
from .rank_rows import LINE_NAMES, print_line
from .signature import parameters, print_wait
from .tile import Position
from .weights import in_codes, plain_tile
from .writer import Writer

# Names that a kernel uses beside those of its values.
_TAKEN = frozenset(
    (
        "num_rows row row_ok n_ok ok k k0 n w x tile head lane lanes cols part parts parts_ptr partial_ptr arrived_ptr "
        "place before split span first until pair upper squares inverse start acc which across across_ok token "
        "here used word words eight factors zeros row_turn row_sums row_factors scaled ahead"
    ).split()
)


def body_writer(graph: Graph) -> Writer:
    """A writer that knows the names which are taken."""
    return Writer({node.name for node in graph.nodes} | set(parameters(graph)) | _TAKEN | LINE_NAMES | set(SENDING))


def wait(tile: MatmulTile) -> None:
    """Print the wait for the kernels in front."""
    print_wait(tile.writer)
    if sent_by(tile.graph) is not None:
        with tile.writer.block("if SEND:"):
            print_line(tile.writer, "row", tile.row_mask, ranks_of(tile.graph))


def accumulators_of(layout: Plan) -> list[str]:
    """The names of the sums, one for each lane."""
    return [f"acc{lane}" for lane in range(layout.lanes)] if layout.lanes > 1 else ["acc"]


def weight_loads(layout: Plan, across: str = "[:, None]", along: str = "[None, :]", more: str = "") -> list[str]:
    """A tile of the weight, not quantised, for each lane; ``across`` and ``along`` are the shapes of its columns and of ``k``."""
    return [
        plain_tile(layout, f"(n + {offset})" if offset else "n", "ok", across, along, more) for offset in layout.offsets
    ]


def print_lookups(tile: MatmulTile) -> None:
    """Print which rows are read, where they are chosen by an index."""
    for node in tile.graph.calls():
        if op_name(node.target) == "aten.index_select":
            tile.looked_up(node.args[2], ("row",), Position(("row",), tile.row_mask))  # type: ignore[arg-type]


def print_rows(tile: MatmulTile, layout: Plan) -> str:
    """Print the rows of the product in its loop."""
    if in_codes(layout):
        return row_codes(tile, layout)
    x = layout.anchor.args[0]
    assert isinstance(x, Node)
    value = tile.value(x, tile.at_k)
    # A norm that adds something makes other values than zero of what lies past the end.
    if any(op_name(node.target) == "nn.layer_norm" for node in tile.graph.calls() if node < layout.anchor):
        value = tile.writer.assign("masked", f"tl.where((k < {layout.depth})[None, :], {value}, 0.0)")
    return value
