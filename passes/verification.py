"""Run every pass against the graph before it, on random numbers in fp32, and say which application is to blame.

Two things are compared. Each value that a pass computes in another way is cut out of both graphs and run on inputs of
its own, so that small mistakes show and the site is known. Then the results of the whole graphs are compared, sequence
by sequence, which also covers passes that change the inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.fx import Node

from ..ir.cache_rounding import without_cache_rounding
from ..ir.dist import ranks_of
from ..ir.draws import row_axis
from ..ir.dump import call_text, dump
from ..ir.errors import FuselineError, VerificationError
from ..ir.graph import Graph, type_of
from ..ir.quantized import without_rounding
from ..ir.verify import excerpt
from .bisection import first_wrong
from .comparison import TOLERANCE, Comparison, Result, distances, is_blind, is_comparable, returning
from .cuts import Side, changed, fingerprint, pair, shared_values
from .ledger import PassReport
from .pipeline import NEEDED, Step, apply
from .reproduction import smallest, write_pass

# A mismatch must show with other numbers too: rounding may turn a choice between experts that score alike.
_SEEDS = (1, 2)
# Rounding is meant to change numbers; that nothing else did is seen without it.
_UNDO = {"Quantize": without_rounding, "ReadRounded": without_rounding, "QuantizeCache": without_cache_rounding}


def verified(
    graph: Graph, running: Iterator[Step], names: Sequence[str], folder: str | Path | None = None
) -> Iterator[Step]:
    """Pass on the steps of ``passes.steps``, each compared with the graph before it.

    Args:
        graph: what the first pass runs on. names: the passes, in order.
        folder: where a reproduction is written; by default ``fuseline-verification/`` in the current directory.

    Raises:
        VerificationError: a pass changes the numbers, fails, or leaves a malformed graph. It names the pass, the
            application, the site, the error and the tolerance, and the files of a reproduction.
    """
    verification = Verification(graph, None if folder is None else Path(folder))
    running = iter(running)
    for number, name in enumerate(names, start=1):
        try:
            step = next(running)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, FuselineError) and not isinstance(error, VerificationError):
                raise
            raise verification.failed(number, name, error) from error
        verification.check(number, step)
        yield step


@dataclass(frozen=True)
class _Mismatch:
    """Where the numbers differ, by how much, and a graph on which they do.

    If that is one value, ``shared`` are those that it is compared from.
    """

    value: str
    error: float
    proof: Graph
    shared: frozenset[str] | None = None


class Verification:
    """Compares the graphs of one run of the pipeline."""

    def __init__(self, graph: Graph, folder: Path | None = None) -> None:
        self._folder = folder
        self._comparison = Comparison.of(graph)
        self._small = Comparison.of(graph)
        self._known: set[object] = set()
        self._right: set[object] = set()
        self._begin(graph)
        if self._expected is None or is_blind(self._expected):
            warnings.warn(
                f"verify: {graph.name} gives no numbers on random inputs; passes are checked value by value only",
                stacklevel=3,
            )

    def _begin(self, graph: Graph) -> None:
        """Expect the numbers of this graph from those that passes make of it."""
        self._first = self._before = graph
        self._expected: list[Result] | None
        try:
            self._expected = self._comparison.results(graph)
        except Exception:  # random numbers are not always valid: then only the cuts are compared
            self._expected = None

    def check(self, number: int, step: Step) -> None:
        """Compare the graph after a pass with the one before; ``number`` is the number of the pass.

        Raises:
            VerificationError: they compute different numbers.
        """
        undo = _UNDO.get(step.name) if step.report.fused else None
        before, after = self._before, undo(step.graph) if undo else step.graph
        if after is not before and dump(before) != dump(after):
            found = self._by_cuts(step.name, before, after) or self._whole(step.name, before, after)
            if found is not None:
                raise self._blame(number, step, found)
        self._before = step.graph
        if undo:
            self._begin(step.graph)

    def failed(self, number: int, name: str, error: Exception) -> VerificationError:
        """What to raise for a pass that fails, or leaves a malformed graph."""

        def is_wrong(limit: int) -> bool:
            try:
                apply(name, self._before, PassReport(name, limit=limit), check=True)
            except Exception:
                return True
            return False

        application, site = first_wrong(self._before, PassReport(name), is_wrong, "graph")
        proof = smallest(name, self._before, site.partition("+")[0]) or self._before
        title = f"{name} fails or leaves a malformed graph at {site}"
        return self._error_of(number, name, application, site, math.inf, title, proof, str(error))

    def _by_cuts(self, name: str, before: Graph, after: Graph) -> _Mismatch | None:
        """The first value that is computed in another way and to another number, if a graph proves that the pass did it."""
        if [node.name for node in before.inputs()] != [node.name for node in after.inputs()]:
            return None
        if ranks_of(before) != ranks_of(after):  # a rank's values are parts of those before
            return None
        old, new = Side.of(before), Side.of(after)
        shared = shared_values(old, new)
        for value in changed(old, new):
            cut = pair(old, new, value, shared)
            if cut is None:
                continue
            key = fingerprint(cut)
            if key in self._known:
                continue
            error = self._error(*cut)
            if error <= TOLERANCE:
                self._known.add(key)
                continue
            proof = smallest(name, before, value, [cut[0]], self._right)
            if proof is not None:
                return _Mismatch(value, error, proof, shared)
            shared -= {value}  # its name stands for another value now: what reads it is compared from further up
        return None

    def _whole(self, name: str, before: Graph, after: Graph) -> _Mismatch | None:
        if self._expected is None:
            return None
        error = self._whole_error(after)
        if error <= TOLERANCE:
            return None
        value = self._first_difference(before, after)
        return _Mismatch(value, error, smallest(name, before, value) or before)

    def _error(self, before: Graph, after: Graph) -> float:
        """How far apart two cuts are, in the draw in which they are nearest."""
        worst = math.inf
        for comparison in (self._small, *map(self._small.reseeded, _SEEDS)):
            try:
                expected = comparison.results(before)
            except Exception:  # the inputs drawn are not valid for it
                return 0.0
            worst = min(worst, _distance(comparison, expected, after))
            if worst <= TOLERANCE:
                break
        return worst

    def _whole_error(self, after: Graph) -> float:
        assert self._expected is not None
        worst = _distance(self._comparison, self._expected, after)
        for seed in _SEEDS:
            if worst <= TOLERANCE:
                break
            other = self._comparison.reseeded(seed)
            worst = min(worst, _distance(other, other.results(self._first), after))
        return worst

    def _first_difference(self, before: Graph, after: Graph) -> str:
        """The first value that both graphs have and that differs, else the result."""
        if ranks_of(before) != ranks_of(after):
            return before.output_node().prev.name
        old, new = ({node.name for node in item.calls() if _has_rows(node)} for item in (before, after))
        common = [node.name for node in before.calls() if node.name in old & new]
        try:
            left, right = (self._comparison.results(returning(item, common)) for item in (before, after))
        except Exception:
            return before.output_node().prev.name
        errors = zip(common, distances(left, right))
        return next((name for name, error in errors if not error <= TOLERANCE), before.output_node().prev.name)

    def _blame(self, number: int, step: Step, found: _Mismatch) -> VerificationError:
        def is_wrong(limit: int) -> bool:
            report = PassReport(step.name, off=step.report.off, limit=limit)
            return self._differs(apply(step.name, self._before, report), found)

        application, site = first_wrong(self._before, step.report, is_wrong, found.value)
        title = f"{step.name} changes the numbers at {site}: relative RMSE {found.error:.1e} in fp32, {TOLERANCE:.0e} allowed"
        node = next((node for node in self._before.calls() if node.name == found.value), None)
        lines = "" if node is None else excerpt(node)
        return self._error_of(number, step.name, application, site, found.error, title, found.proof, lines)

    def _error_of(
        self,
        number: int,
        name: str,
        application: int | None,
        site: str,
        error: float,
        title: str,
        proof: Graph,
        detail: str,
    ) -> VerificationError:
        files = write_pass(name, site, proof, title, self._folder)
        which = "" if application is None else f"It is application {application} of {name}, pass {number}. "
        return VerificationError(
            f"{title}\n{detail}\n{which}{_how_to_skip(name, application, number)}\n"
            f"Reproduction: {files[0]}, {files[1]}",
            pass_name=name,
            site=site,
            application=application,
            error=error,
            tolerance=TOLERANCE,
            files=files,
        )

    def _differs(self, after: Graph, found: _Mismatch) -> bool:
        """Whether a mismatch is there in another graph after the pass."""
        if found.shared is None:
            return not self._whole_error(after) <= TOLERANCE
        old, new = Side.of(self._before), Side.of(after)
        if found.value not in new.named or call_text(old.named[found.value]) == call_text(new.named[found.value]):
            return False
        cut = pair(old, new, found.value, shared_values(old, new) & found.shared)
        return cut is not None and not self._error(*cut) <= TOLERANCE


def _distance(comparison: Comparison, expected: Sequence[Result], after: Graph) -> float:
    try:
        return max(distances(expected, comparison.results(after)), default=0.0)
    except Exception:  # an operator refuses values that it took before
        return math.inf


def _has_rows(node: Node) -> bool:
    return is_comparable(node) and row_axis(type_of(node)) is not None


def _how_to_skip(name: str, application: int | None, number: int) -> str:
    if name in NEEDED:
        return f"{name} cannot be switched off: without it the graph does not run over a paged cache."
    if application is None:
        return f'skip=["{name}"] switches it off.'
    return f'skip=["{name}#{application}"] switches this application off, skip=[{number}] the whole pass.'
