"""What goes into a matmul's kernel: the work on its result that a tile can do, and the norm in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Node

from ..ir.graph import Region, flat_types, is_constant, type_of
from ..ir.ops import op_name
from ..ir.tiles import TILE_MEETINGS, is_pointwise, is_row_op


@dataclass(frozen=True)
class Frame:
    """Where a value lies in the columns of the matmul's result.

    ``starts`` are the columns that its operands begin at, ``width`` how many it has, ``head_dim`` is set once it has
    been split into heads.
    """

    starts: frozenset[int]
    width: int
    head_dim: int | None


def epilogue_of(anchor: Node, taken: dict[Node, Region]) -> tuple[list[Node], tuple[str, Node] | None]:
    """The anchor and all that its kernel computes after it, in graph order; and why and where growth stopped, if it did."""
    width = type_of(anchor).shape[-1]
    assert isinstance(width, int)
    frames: dict[Node, Frame] = {anchor: Frame(frozenset({0}), width, None)}
    sections = _sections(anchor, taken)
    for part in sections:
        low, high = part.args[2], part.args[3]
        assert isinstance(low, int) and isinstance(high, int)
        frames[part] = Frame(frozenset({low}), high - low, None)
    later = _descendants(anchor)
    stopped: tuple[str, Node] | None = None
    for node in later:
        if node in frames or node in taken or node.op != "call_function":
            continue
        inner = [item for item in node.all_input_nodes if item in frames]
        if not inner or (sections and anchor in inner):
            continue
        outer = [item for item in node.all_input_nodes if item not in frames]
        if any(item in later for item in outer):
            stopped = stopped or (f"{node.name} also needs a value that depends on {anchor.name}", node)
            continue
        frame = _frame_after(node, [frames[item] for item in inner], inner)
        if frame is None:
            stopped = stopped or (f"{node.name}: {op_name(node.target)} does not fit on a tile of {anchor.name}", node)
            continue
        frames[node] = frame
    members = list(frames)
    if sections and not _consistent(members, frames, sections):
        return [anchor], ("the parts of the result are used in ways that differ in width", anchor)
    heads = {frame.head_dim for frame in frames.values() if frame.head_dim}
    if len(heads) > 1 or (heads and not sections and any(width % head for head in heads)):
        keep = [node for node in members if frames[node].head_dim is None]
        return keep, ("its parts have heads of different sizes", anchor)
    return members, stopped


def _sections(anchor: Node, taken: dict[Node, Region]) -> list[Node]:
    """The slices of columns that the result is used by, if it is used by nothing else and they do not overlap."""
    parts = []
    for user in anchor.users:
        if op_name(user.target) != "aten.slice.Tensor" or user.args[1] != -1 or len(user.args) > 4 or user in taken:
            return []
        parts.append(user)
    parts.sort(key=lambda node: node.args[2])  # type: ignore[arg-type, return-value]
    for left, right in pairwise(parts):
        if left.args[3] > right.args[2]:  # type: ignore[operator]
            return []
    return parts


def _descendants(anchor: Node) -> dict[Node, None]:
    """Everything that depends on the anchor, in graph order."""
    found = {anchor: None}
    node = anchor.next
    while node.op != "root":
        if any(item in found for item in node.all_input_nodes):
            found[node] = None
        node = node.next
    del found[anchor]
    return found


def _frame_after(node: Node, frames: list[Frame], inner: list[Node]) -> Frame | None:
    """The frame of the operator's result, or nothing if a tile cannot compute it."""
    name = op_name(node.target)
    first = frames[0]
    if any((frame.width, frame.head_dim) != (first.width, first.head_dim) for frame in frames):
        return None
    starts = frozenset().union(*(frame.starts for frame in frames))
    kind = flat_types(node.meta["type"])[0]
    if is_pointwise(node):
        expected = flat_types(inner[0].meta["type"])[0].shape
        return Frame(starts, first.width, first.head_dim) if kind.shape == expected else None
    if len(frames) != 1:
        return None
    if name == "aten.reshape":
        source = type_of(inner[0])
        split = source.rank == 2 and kind.rank == 3 and kind.shape[0] == source.shape[0]
        head_dim = kind.shape[2] if split else None
        if isinstance(head_dim, int) and 16 <= _padded(head_dim) <= 256:
            return Frame(starts, first.width, head_dim)
        return None
    if first.head_dim is None:
        return None
    if name in ("nn.rms_norm", "nn.layer_norm", "nn.rope") and node.args[0] is inner[0]:
        return first
    if name == "nn.cache_write" and node.args[1] is inner[0]:
        return first
    return None


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _consistent(members: list[Node], frames: dict[Node, Frame], sections: list[Node]) -> bool:
    """Every part is combined with the same number of others, of its own width; all split into heads, or none."""
    partners: dict[int, frozenset[int]] = {}
    for node in members:
        starts = frames[node].starts
        for start in starts:
            partners[start] = partners.get(start, frozenset()) | starts
    groups = {partners[start] for part in sections for start in frames[part].starts}
    if sum(map(len, groups)) != len(sections) or len({len(group) for group in groups}) != 1:
        return False
    split = {start for node in members if frames[node].head_dim for start in frames[node].starts}
    return not split or len(split) == len(sections)


def reads_meeting(norm: Node) -> bool:
    """Whether a norm's rows are made where ranks meet: whole rows are at hand there already."""
    rows = norm.args[0]
    assert isinstance(rows, Node)
    near = [rows, *(rows.all_input_nodes if is_pointwise(rows) else [])]
    return any(op_name(item.target) in TILE_MEETINGS and is_row_op(item) for item in near)


def prologue_of(anchor: Node, members: list[Node], taken: dict[Node, Region]) -> list[Node]:
    """The rounding and the norm that make the anchor's rows, and the selection of rows or columns before them, where no one
    else reads."""
    found: list[Node] = []
    node = anchor.args[0]
    while isinstance(node, Node) and node.op == "call_function" and node not in taken and not is_constant(node):
        name = op_name(node.target)
        norm = name in ("nn.rms_norm", "nn.layer_norm") and not any(
            op_name(item.target) in ("nn.rms_norm", "nn.layer_norm") for item in found
        )
        norm = norm and not reads_meeting(node)
        lookup = name == "aten.index_select" and node.args[1] == 0
        part = name == "aten.slice.Tensor" and node.args[1] == -1
        rounded = name == "nn.quantize" and not found
        inside = {*members, *found}
        if not (norm or lookup or part or rounded) or any(user not in inside for user in node.users):
            break
        found.insert(0, node)
        node = node.args[0]
    return found
