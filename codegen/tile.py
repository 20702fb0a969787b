"""Print the values of a region as Triton expressions on a tile, on demand.

A value is asked for at a position: one coordinate expression for each of its dims, and the mask under which the
coordinates are valid. Views (slices, transposes, reshapes) only change the coordinates; what comes from memory is
loaded at them; everything else is one expression of its operands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import LOOKUPS, op_name
from ..ir.tiles import TILE_LARGEST, TILE_POINTWISE
from .coordinates import flat_index, through_view
from .expressions import literal, print_pointwise
from .writer import Writer

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_FUNCTIONS = frozenset({"tl", "where", "None"})


@dataclass(frozen=True)
class Position:
    """Where on a value: ``coords`` are Triton expressions that broadcast against each other.

    ``rows`` and ``cols`` are the masks under which the row and the column coordinates are valid; empty if always.
    """

    coords: tuple[str, ...]
    rows: str = ""
    cols: str = ""

    def at(self, coords: tuple[str, ...], cols: str | None = None) -> Position:
        """Other coordinates under the same masks, or under another column mask."""
        return Position(coords, self.rows, self.cols if cols is None else cols)

    @property
    def mask(self) -> str:
        return " & ".join(filter(None, (self.rows, self.cols)))


class Tile:
    """Prints values of one region into a ``Writer``.

    ``given`` are values that exist already as tiles (a matmul's accumulator): they are known at their ``home`` position
    alone. ``row_norm`` prints a norm's statistics: how depends on whether whole rows are at hand.
    """

    def __init__(self, graph: Graph, writer: Writer) -> None:
        self.graph = graph
        self.writer = writer
        self.given: dict[Node, str] = {}
        self.home: Callable[[Node], Position] | None = None
        self.statistics: Callable[[Node, Callable[[Position], str], Position], tuple[str, str]] = self._no_statistics
        # Names in coordinates that vary with the row, and those that are one number for the whole tile.
        self.row_names: set[str] = {"row"}
        self.scalars: set[str] = set()
        self._known: list[dict[tuple[Node, Position], str]] = [{}]
        self._on_given: dict[Node, bool] = {}

    def enter(self) -> None:
        """Begin an inner block: what is printed in it is unknown after it."""
        self._known.append({})

    def leave(self) -> None:
        self._known.pop()

    def value(self, node: Node, at: Position) -> str:
        """The name of a tile that holds the node's values at the position."""
        if node in self.given:
            return self.given[node]
        if self.home is not None and self.on_given(node):
            at = self.home(node)
        key = (node, at)
        for scope in reversed(self._known):
            if key in scope:
                return scope[key]
        text = self._load(node, at) if node.op == "placeholder" else self._compute(node, at)
        if node.op != "placeholder" and text.isidentifier():
            name = text
        else:
            name = self.writer.assign(node.name, text)
        self._known[-1][key] = name
        return name

    def on_given(self, node: Node) -> bool:
        """Whether a value is computed from a given tile."""
        found = self._on_given.get(node)
        if found is None:
            if op_name(node.target) == "nn.cache_write":
                found = isinstance(node.args[1], Node) and self.on_given(node.args[1])
            else:
                found = node in self.given or any(map(self.on_given, node.all_input_nodes))
            self._on_given[node] = found
        return found

    def _load(self, node: Node, at: Position) -> str:
        kind = type_of(node)
        if not kind.shape:
            return (
                f"tl.load({node.name}_ptr).to(tl.float32)"
                if kind.torch_dtype.is_floating_point
                else f"tl.load({node.name}_ptr)"
            )
        mask = self._needed_mask(at)
        guard = f", mask={mask}, other=0" if mask else ""
        loaded = f"tl.load({node.name}_ptr + {flat_index(at.coords, kind.shape)}{guard})"
        if kind.dtype == "bool":
            return f"{loaded} != 0"
        return f"{loaded}.to(tl.float32)" if kind.torch_dtype.is_floating_point else loaded

    def _needed_mask(self, at: Position) -> str:
        """The masks of the coordinates that occur: a vector over the columns needs none for the rows."""
        names = set(_IDENTIFIER.findall(" ".join(at.coords))) - _FUNCTIONS
        rows, cols = names & self.row_names, names - self.row_names - self.scalars
        return " & ".join(filter(None, (at.rows if rows else "", at.cols if cols else "")))

    def _compute(self, node: Node, at: Position) -> str:
        name = op_name(node.target)
        if name in TILE_POINTWISE or name == "nn.head_codes":
            return print_pointwise(node, [self._operand(item, node, at) for item in node.args])
        if name == "aten.cat":
            return self._cat(node, at)
        source = node.args[0]
        assert isinstance(source, Node)
        if name == "dist.send" or (self.home is not None and self.on_given(node) and name == "aten.reshape"):
            return self.value(source, at)
        moved = through_view(node, at.coords)
        if moved is not None:
            return self.value(source, at.at(moved))
        if name in LOOKUPS:
            ids = node.args[1]
            assert isinstance(ids, Node)
            row = self.looked_up(ids, at.coords[:-1], at)
            if name == "nn.lookup":
                there = f"({row} >= 0) & ({row} < {type_of(source).shape[0]})"
                at = Position(at.coords, " & ".join(filter(None, (at.rows, there))), at.cols)
            return self._load(source, at.at((row, at.coords[-1])))
        if name == "aten.index_select":
            rows = node.args[2]
            assert isinstance(rows, Node)
            return self.value(source, at.at((self.looked_up(rows, at.coords[:1], at), *at.coords[1:])))
        if name == "aten.scatter.value":
            index = node.args[2]
            assert isinstance(index, Node)
            found = self.value(index, at.at((*at.coords[:-1], "0"), ""))
            return f"tl.where({at.coords[-1]} == {found}, {literal(node.args[3])}, {self.value(source, at)})"
        if name == "nn.rope":
            return self._rope(node, at)
        if name in ("nn.rms_norm", "nn.layer_norm"):
            return self._norm(node, source, lambda place: self.value(source, place), at)
        if name == "getitem":
            which = int(str(node.args[1]))
            if op_name(source.target) in TILE_LARGEST:
                return self.largest(source, which, at)
            return self._add_norm(source, which, at)
        return self._reduction(node, source, name, at)

    def looked_up(self, ids: Node, coords: tuple[str, ...], at: Position) -> str:
        """An index read from memory, to be used as a row coordinate."""
        row = self.value(ids, at.at(coords, ""))
        self.row_names.add(row)
        return row

    def _operand(self, item: Any, node: Node, at: Position) -> str:
        if not isinstance(item, Node):
            return literal(item)
        return self.value(item, self._aligned(item, node, at))

    def _aligned(self, item: Node, node: Node, at: Position) -> Position:
        """The position on an operand that is broadcast to the result's shape."""
        shape, whole = type_of(item).shape, type_of(node).shape
        coords = at.coords[len(whole) - len(shape) :] if shape else ()
        return at.at(tuple("0" if size == 1 else coord for size, coord in zip(shape, coords)))

    def _cat(self, node: Node, at: Position) -> str:
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        column, start, text = at.coords[-1], 0, ""
        for part in parts:
            assert isinstance(part, Node)
            width = type_of(part).shape[-1]
            assert isinstance(width, int)
            place = column if start == 0 else f"({column} - {start})"
            bounds = f"({column} >= {start}) & ({column} < {start + width})"
            value = self.value(part, at.at((*at.coords[:-1], place), f"{at.cols} & {bounds}" if at.cols else bounds))
            text = value if not text else f"tl.where({column} < {start}, {text}, {value})"
            start += width
        return text

    def _rope(self, node: Node, at: Position) -> str:
        x, cos, sin = node.args[:3]
        pairing = node.args[3] if len(node.args) > 3 else "half"
        assert isinstance(x, Node) and isinstance(cos, Node) and isinstance(sin, Node)
        width, column = type_of(cos).shape[-1], at.coords[-1]
        assert isinstance(width, int)
        if pairing == "half":
            half = width // 2
            # Said like this, neighbours are seen to have neighbours as partners, which are loaded together.
            partner = f"({column} + {half}) % {width}"
            sign = f"tl.where({column} < {half}, -1.0, 1.0)"
        else:
            partner = f"tl.where({column} < {width}, {column} ^ 1, {column})"
            sign = f"tl.where({column} % 2 == 0, -1.0, 1.0)"
        here = self.value(x, at)
        if self.home is not None and self.on_given(x):
            there = self.rotated_partner(here)
        else:
            partner = self.writer.assign("partner", partner)
            there = self.value(x, at.at((*at.coords[:-1], partner)))
        full = type_of(x).shape[-1]
        bounds = at.cols if full == width else " & ".join(filter(None, (at.cols, f"({column} < {width})")))
        place = at.at((*at.coords[:-2], column), bounds)
        c, s = self.value(cos, place), self.value(sin, place)
        if full != width:
            c = self.writer.assign("cos", f"tl.where({column} < {width}, {c}, 1.0)")
            s = self.writer.assign("sin", f"tl.where({column} < {width}, {s}, 0.0)")
        return f"{here} * {c} + {sign} * {there} * {s}"

    def _norm(self, node: Node, source: Node, read: Callable[[Position], str], at: Position) -> str:
        bias = node.args[2] if op_name(node.target) == "nn.layer_norm" else None
        mean, deviation = self.statistics(node, read, at)
        x = read(at)
        text = f"({x} - {mean})" if mean else x
        text = f"{text} * {deviation}" if deviation else text
        place = at.at(at.coords[-1:])
        scale = node.args[1] if op_name(node.target) != "nn.add_rms_norm" else node.args[2]
        if isinstance(scale, Node):
            text = f"{text} * {self.value(scale, place)}"
        return f"{text} + {self.value(bias, place)}" if isinstance(bias, Node) else text

    def _add_norm(self, node: Node, which: int, at: Position) -> str:
        x, residual = node.args[:2]
        assert isinstance(x, Node) and isinstance(residual, Node)

        def total(place: Position) -> str:
            key = (node, place)
            if key not in self._known[-1]:
                self._known[-1][key] = self.writer.assign(
                    "total", f"{self.value(x, place)} + {self.value(residual, place)}"
                )
            return self._known[-1][key]

        return total(at) if which == 0 else self._norm(node, x, total, at)

    def rotated_partner(self, here: str) -> str:
        """The other value of each pair of a given tile that is rotated."""
        raise AssertionError("only a matmul holds tiles that are rotated")

    def largest(self, node: Node, which: int, at: Position) -> str:
        """The largest numbers of whole rows, or (``which`` is 1) their columns."""
        raise AssertionError("a tile of a matmul holds no whole rows")

    def _reduction(self, node: Node, source: Node, name: str, at: Position) -> str:
        raise AssertionError(f"{name} needs whole rows, which a tile of a matmul does not hold")

    def _no_statistics(self, node: Node, read: Any, at: Position) -> tuple[str, str]:
        raise AssertionError("this tile holds no whole rows")
