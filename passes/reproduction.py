"""The smallest graph on which a pass changes the numbers, written as a text file and a pytest file that fails."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from ..ir.dump import dump
from ..ir.graph import Graph, is_constant
from ..ir.reproduction import write_reproduction
from ..ir.verify import verify
from .comparison import TOLERANCE, Comparison, distances, is_comparable
from .cuts import ball, fingerprint, narrowed
from .ledger import PassReport
from .pipeline import apply

_RADII = (1, 2, 3, 4, 6, 9, 14)

_TEST = '''\
"""{title}. Fails until the pass is mended."""

from pathlib import Path

from fuseline import ir, passes
from fuseline.passes.comparison import TOLERANCE, Comparison, distances


def test_{stem}() -> None:
    before = ir.parse(Path(__file__).with_name("{stem}.txt").read_text())
    (step,) = passes.steps(before, ["{name}"], check=True)
    comparison = Comparison.of(before)
    errors = distances(comparison.results(before), comparison.results(step.graph))
    assert max(errors) <= TOLERANCE, f"relative RMSE {{max(errors):.1e}}"
'''


def error_of(name: str, before: Graph) -> float:
    """How far a pass moves the results of a graph; infinite if it fails on it or leaves it malformed."""
    comparison = Comparison.of(before)
    try:
        verify(before)
        expected = comparison.results(before)
    except Exception:  # the graph itself cannot be run, or states parts that its inputs are not: it shows nothing
        return 0.0
    try:
        after = apply(name, before, PassReport(name), check=True)
        return max(distances(expected, comparison.results(after)), default=0.0) if after is not before else 0.0
    except Exception:
        return math.inf


def smallest(
    name: str, graph: Graph, site: str, cuts: Iterable[Graph] = (), right: set[object] | None = None
) -> Graph | None:
    """The smallest graph found on which the pass changes the numbers; nothing if it does not on all of them.

    Tried are ``cuts``, what lies around the site, and the whole. The first that fails is reduced to one result, and as
    many of its values as can be are given as inputs. ``right`` collects those that did not fail, which are not tried
    again: what lies around one site is what lies around that of another layer.
    """
    right = set() if right is None else right
    around = (ball(graph, site, radius) for radius in _RADII)
    for candidate in (*cuts, *(item for item in around if item is not None), graph):
        key = (name, fingerprint([candidate]))
        if key in right:
            continue
        if not error_of(name, candidate) <= TOLERANCE:
            return _reduced(name, candidate)
        right.add(key)
    return None


def _reduced(name: str, graph: Graph) -> Graph:
    inner = [node.name for node in graph.calls() if is_comparable(node) and not is_constant(node)]

    def fails(result: str, given: frozenset[str]) -> bool:
        part = narrowed(graph, result, given)
        return part is not None and not error_of(name, part) <= TOLERANCE

    result = next((item for item in inner if fails(item, frozenset())), None)
    if result is None:
        return graph
    given: frozenset[str] = frozenset()
    for item in reversed(inner[: inner.index(result)]):
        if fails(result, given | {item}):
            given |= {item}
    return narrowed(graph, result, given) or graph


def write_pass(name: str, site: str, graph: Graph, title: str, folder: Path | None) -> tuple[Path, Path]:
    """Write ``<Pass>_<site>.txt`` and ``test_<Pass>_<site>.py``."""
    stem = f"{name}_{re.sub(r'[^A-Za-z0-9_]+', '_', site)[:60]}"
    return write_reproduction(folder, stem, dump(graph), _TEST.format(title=title, stem=stem, name=name))
