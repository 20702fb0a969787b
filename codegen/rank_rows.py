"""What kernels print to meet those of other ranks, and the files of those that add up rows over the ranks."""

from __future__ import annotations

from torch.fx import Node

from ..ir.dist import ranks_of
from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from .coordinates import padded_width
from .exchange import FEW_ROWS, NOT_SENT, SENDING
from .signature import TRITON_TYPES
from .writer import Writer

LINE_NAMES = frozenset({"line", "line_ok", "step", "tag", "turn", "SEND"} | {f"at_{rank}" for rank in range(64)})
"""Names that a kernel uses for it."""


def print_line(writer: Writer, row: str, row_ok: str, ranks: int = 0) -> None:
    """Print what is known of a meeting before there is anything to send: its number, and where the ranks' memory is."""
    writer.line(f"line = tl.zeros((1, 1), tl.int64) + {row}")
    writer.line(f"line_ok = {row_ok or 'line >= 0'}")
    writer.line("step = tl.load(steps_ptr, volatile=True)")
    writer.line("tag = step * meetings + number")
    writer.line("turn = ((step & 1) * 2 + (number & 1)).to(tl.int64)")
    for rank in range(ranks):
        writer.line(f"at_{rank} = tl.load(ranks_ptr + {rank})")


def print_send(writer: Writer, node: Node, value: str, column: str, ranks: int) -> None:
    """Print how a tile of a value goes to all ranks; ``column`` are its columns."""
    kind, width = type_of(node), type_of(node).shape[-1]
    places = ", ".join(f"at_{rank}" for rank in range(ranks))
    writer.line(
        f"send_to_ranks({value}, line, line_ok, {column}, tag, turn, ({places},), rank, stride, slot, "
        f"{TRITON_TYPES[kind.dtype]}, {width})"
    )


def received(graph: Graph, node: Node) -> str:
    """The expression of the sum over the ranks, a tile of whole rows."""
    kind, width = type_of(node), type_of(node).shape[-1]
    assert isinstance(width, int)
    constants = f"{ranks_of(graph)}, {TRITON_TYPES[kind.dtype]}, {width}, {padded_width(width)}"
    return f"sum_of_ranks(line, line_ok, tag, turn, mine_ptr, stride, slot, {constants})"


def sending_text(node: Node) -> str:
    """The host's part of a kernel file for what it sends: ``sending(ranks, num_rows)`` gives the kernels' arguments for it."""
    kind, width = type_of(node), type_of(node).shape[-1]
    assert isinstance(width, int)
    return f'''\
NOT_SENT = {NOT_SENT}
SENDING = {SENDING}


def with_sending(variant):
    """A variant that sends, of one that does not."""
    constants = {{name: value for name, value in variant["constexprs"].items() if name not in NOT_SENT}}
    types = {{**variant["signature"], **SENDING}}
    return {{**variant, "signature": types, "constexprs": {{**constants, "SEND": True}}, "divisible_by_16": ["stride", "slot"]}}


def sending(ranks, num_rows):
    """What a kernel needs to send its rows to the ranks, if they meet this way."""
    if ranks is None or num_rows > {FEW_ROWS}:
        return NOT_SENT
    if not ranks.takes(num_rows, {padded_width(width)}, num_rows * {width * kind.torch_dtype.itemsize}):
        return NOT_SENT
    ranks.next()
    return ranks.sending


'''


def waits_itself(meeting: Node | None) -> bool:
    """Whether a kernel needs nothing of the one in front but what that has sent."""
    return meeting is not None and op_name(meeting.target) == "dist.receive"
