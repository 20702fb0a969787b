"""What a matmul makes for a sum over ranks is sent to them from its kernel, tile by tile."""

from __future__ import annotations

from torch.fx import Node

from ..ir.build import insert_before
from ..ir.dist import MEETINGS
from ..ir.graph import Graph, type_of
from ..ir.ops import op_name, resolve
from ..ir.tiles import is_row_op


def sent_after(graph: Graph, members: list[Node]) -> list[Node]:
    """Where all that others read of a matmul's kernel is added up over the ranks: the ``dist.send`` that is put in for it.

    The sum becomes a ``dist.receive``, which waits for what is sent and for nothing else.
    """
    results = [node for node in members if any(user not in members for user in node.users)]
    if len(results) != 1 or type_of(results[0]).rank != 2:
        return []
    users = list(results[0].users)
    if len(users) != 1 or op_name(users[0].target) != "dist.all_reduce" or not is_row_op(users[0]):
        return []
    made, total = results[0], users[0]
    args = (made, *total.args[1:])
    sent = insert_before(graph, made.next, resolve("dist.send"), args, name=f"{made.name}_sent", source="GroupKernels")
    total.replace_input_with(made, sent)
    total.target = resolve("dist.receive")
    return [sent]


def take_turns(graph: Graph) -> None:
    """Ranks meet once at a time: what is sent while something else is on its way stays behind for its sum instead.

    The nodes are in the order in which they are run.
    """
    under_way: Node | None = None
    for node in list(graph.calls()):
        name = op_name(node.target)
        if under_way is not None and name in ("dist.send", *MEETINGS - {"dist.receive"}):
            _keep(graph, under_way)
            under_way = None
        if name == "dist.send":
            under_way = node
        elif name == "dist.receive" and node.args[0] is under_way:
            under_way = None


def _keep(graph: Graph, sent: Node) -> None:
    """Undo a ``dist.send``."""
    (total,) = sent.users
    made = sent.args[0]
    assert isinstance(made, Node)
    total.target = resolve("dist.all_reduce")
    total.replace_input_with(sent, made)
    graph.erase_node(sent)
