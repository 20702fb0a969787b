"""Drawing a small acyclic graph top to bottom: boxes in ranks, edges routed between them.

The layered method of Sugiyama, Tagawa and Toda (1981): rank by longest path, give long edges a place in each rank they
pass, order every rank by the barycenter of its neighbours, then pull boxes towards their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

_GAP_X, _GAP_Y, _LANE = 20.0, 38.0, 10.0
_SWEEPS = 12


@dataclass(eq=False)
class _Spot:
    """A box, or the place of a long edge in a rank it passes. ``x`` is the centre, ``floor`` where the rank ends."""

    rank: int
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    floor: float = 0.0
    above: list[_Spot] = field(default_factory=list, repr=False)
    below: list[_Spot] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Drawing:
    """``corners`` of the boxes (left, top), ``routes`` of the edges as SVG paths, and the size of it all, in pixels."""

    corners: list[tuple[float, float]]
    routes: list[str]
    width: float
    height: float


def layout(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Drawing:
    """Place boxes of ``(width, height)``. ``edges`` lead from a box to one with a higher index, each pair once."""
    boxes = [_Spot(rank, *size) for rank, size in zip(_ranks(len(sizes), edges), sizes)]
    ranks: list[list[_Spot]] = [[] for _ in range(max((box.rank for box in boxes), default=-1) + 1)]
    for box in boxes:
        ranks[box.rank].append(box)
    paths = [_path(boxes[source], boxes[target], ranks) for source, target in edges]
    _order(ranks)
    _place(ranks)
    left = min((spot.x - spot.width / 2 for row in ranks for spot in row), default=0.0)
    for spot in (spot for row in ranks for spot in row):
        spot.x -= left
    return Drawing(
        [(round(box.x - box.width / 2, 1), round(box.y, 1)) for box in boxes],
        [_route(path) for path in paths],
        max((spot.x + spot.width / 2 for row in ranks for spot in row), default=0.0),
        max((box.y + box.height for box in boxes), default=0.0),
    )


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    ranks = [0] * count
    for source, target in sorted(edges):
        ranks[target] = max(ranks[target], ranks[source] + 1)
    # What is read late and computed from nothing stands right above its first reader.
    targets = {target for _, target in edges}
    for box in set(range(count)) - targets:
        ranks[box] = max(0, min((ranks[target] for source, target in edges if source == box), default=1) - 1)
    return ranks


def _path(source: _Spot, target: _Spot, ranks: list[list[_Spot]]) -> list[_Spot]:
    lanes = [_Spot(rank, _LANE, 0.0) for rank in range(source.rank + 1, target.rank)]
    for lane in lanes:
        ranks[lane.rank].append(lane)
    path = [source, *lanes, target]
    for upper, lower in pairwise(path):
        upper.below.append(lower)
        lower.above.append(upper)
    return path


def _order(ranks: list[list[_Spot]]) -> None:
    """Sort each rank by the mean place of its neighbours, downwards and upwards in turn; ``x`` is the place so far."""
    for row in ranks:
        for index, spot in enumerate(row):
            spot.x = float(index)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in ranks if down else reversed(ranks):
            wanted = {id(spot): _mean(spot.above if down else spot.below, spot.x) for spot in row}
            row.sort(key=lambda spot: wanted[id(spot)])
            for index, spot in enumerate(row):
                spot.x = float(index)


def _place(ranks: list[list[_Spot]]) -> None:
    top = 0.0
    for row in ranks:
        tallest = max(spot.height for spot in row)
        for spot in row:
            spot.y = top
            spot.floor = top + tallest
        top += tallest + _GAP_Y
    for row in ranks:
        _spread(row, [0.0] * len(row))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in ranks if down else reversed(ranks):
            _spread(row, [_mean(spot.above if down else spot.below, spot.x) for spot in row])


def _spread(row: list[_Spot], wanted: list[float]) -> None:
    """Put a rank near the wanted centres, in order and apart: halfway between pushing all right and all left."""
    apart = [(a.width + b.width) / 2 + _GAP_X for a, b in pairwise(row)]
    right, left = list(wanted), list(wanted)
    for index, distance in enumerate(apart):
        right[index + 1] = max(right[index + 1], right[index] + distance)
    for index, distance in reversed(list(enumerate(apart))):
        left[index] = min(left[index], left[index + 1] - distance)
    for spot, low, high in zip(row, left, right):
        spot.x = (low + high) / 2


def _mean(spots: Sequence[_Spot], otherwise: float) -> float:
    return fmean(spot.x for spot in spots) if spots else otherwise


def _port(box: _Spot, other: _Spot, others: list[_Spot]) -> float:
    """Where an edge meets a box: edges of one side stand side by side, in the order of what they lead to."""
    place = sorted(others, key=lambda spot: spot.x).index(other)
    return box.x + (place - (len(others) - 1) / 2) * min(18.0, box.width * 0.8 / max(1, len(others) - 1))


def _route(path: list[_Spot]) -> str:
    """Straight down to where the rank ends, so as to cross none of its boxes, then curved to the next rank."""
    x = _port(path[0], path[1], path[0].below)
    text = f"M{x:.1f} {path[0].y + path[0].height:.1f}"
    for before, spot in pairwise(path):
        to, middle = _port(spot, before, spot.above), (before.floor + spot.y) / 2
        text += f"V{before.floor:.1f}C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {spot.y:.1f}"
        x = to
    return text
