"""What must hold for every graph and every pass: the same numbers in fp32, an exact text, and the same from the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from random_fragments import VOCABULARY
from random_graphs import Recipe, build, draw_weights, shrink
from torch import Tensor

from fuseline import ir, passes
from fuseline.ir.cache_rounding import without_cache_rounding
from fuseline.ir.graph import type_of
from fuseline.ir.interpret import interpret
from fuseline.ir.ops import op_name
from fuseline.ir.quantized import without_rounding
from fuseline.runtime.selfcheck import step_of

TOLERANCE = 1e-5
Apply = Callable[[str, ir.Graph], ir.Graph]


class Broken(AssertionError):
    """A pass that changed what a graph computes, or its text; ``site`` says after which passes."""

    def __init__(self, site: str, why: str, text: str) -> None:
        super().__init__(f"{site}: {why}")
        self.site = site
        self.text = text


def apply_pass(name: str, graph: ir.Graph) -> ir.Graph:
    """The graph after a pass. A pass that stumbles over a graph is broken too, although a compile would go on."""
    (step,) = passes.steps(graph, [name])
    stumbled = [refusal.why for refusal in step.report.refused if refusal.site == "graph"]
    if stumbled:
        raise AssertionError(stumbled[0])
    return step.graph


class Trial:
    """One graph and its numbers, with which those of every graph made of it are compared."""

    def __init__(self, recipe: Recipe, apply: Apply = apply_pass) -> None:
        self.apply = apply
        self.replays = recipe.seed % 2 == 0  # the passes that changed something, from the text before them
        self.thorough = recipe.seed % 8 == 0  # and those that did nothing
        generator = torch.Generator().manual_seed(recipe.seed)
        prompt = torch.randint(0, VOCABULARY, (recipe.tokens,), generator=generator).tolist()
        self.step = step_of([prompt], recipe.block, torch.device("cpu"))
        self.slots = -(-len(prompt) // recipe.block) * recipe.block
        self.rows = torch.tensor([recipe.tokens - 1, 0])
        built = build(recipe)
        self.weights = draw_weights(built, recipe.seed)
        self.text = ir.dump(built)
        self.seen = {self.text}
        self.alone: dict[str, tuple[ir.Graph, str]] = {}  # by pass: what it makes of the graph as it is
        try:
            self.graph = ir.parse(self.text)
            ir.verify(self.graph)
            self.expected = self.numbers(self.graph, self.text)
            assert all(bool(item.isfinite().all()) for item in self.expected), "the graph's numbers are not finite"
        except Exception as error:
            raise Broken("input", _why(error), self.text) from error

    def each_alone(self) -> None:
        """Every pass on the graph as it is."""
        for name in passes.PASSES:
            self.alone[name] = self.after(name, self.graph, self.text, name)

    def all_in_order(self) -> None:
        """The pipeline, and its passes again on the text that each started from."""
        graph, text = self.graph, self.text
        for number, name in enumerate(passes.PASSES.pipeline):
            site = f"{name} ({number} in the pipeline)"
            made, after = self.alone[name] if graph is self.graph else self.after(name, graph, text, site)
            if (after != text and self.replays) or self.thorough:
                again = self.alone[name][1] if text == self.text else ir.dump(self.apply(name, ir.parse(text)))
                if again != after:
                    raise Broken(site, f"it gives\n{after}\nand replayed from its text\n{again}", text)
            graph, text = made, after

    def after(self, name: str, graph: ir.Graph, text: str, site: str) -> tuple[ir.Graph, str]:
        """The graph and its text after a pass, compared with the input of the trial."""
        try:
            before = _content(graph)
            made = self.apply(name, graph)
            assert _content(graph) == before, "the pass changed its input"
            if made is graph and not self.thorough:
                return graph, text
            after = ir.dump(made)
            if after not in self.seen:
                ir.verify(made)
                self.compare(made, after)
                self.seen.add(after)
        except Exception as error:
            raise Broken(site, _why(error), text) from error
        return made, after

    def numbers(self, graph: ir.Graph, text: str) -> tuple[Tensor, ...]:
        """The results of a graph with types narrower than fp32 widened, weights and caches not quantised: no rewrite rounds."""
        if "bf16" in text:
            graph = ir.parse(text.replace("bf16", "f32"))
        if "nn.quantize" in text:
            graph = without_rounding(graph)
        if "nn.head_codes" in text:
            graph = without_cache_rounding(graph)
        inputs = {node.name: getattr(self.step, node.name) for node in graph.inputs()}
        if "rows" in inputs:
            inputs["rows"] = self.rows
        caches = {
            f"{node.args[0]}{node.args[1]}": torch.full(type_of(node).concrete({"C": self.slots}), float("nan"))
            for node in graph.calls()
            if op_name(node.target) == "cache"
        }
        return interpret(graph, inputs, self.weights, caches)

    def compare(self, graph: ir.Graph, text: str) -> None:
        """Relative RMSE; values near 0 count as if they were 0.1, for they may be what is left of larger ones."""
        selected = any(node.name == "rows" for node in graph.inputs())
        for left, right in zip(self.expected, self.numbers(graph, text), strict=True):
            expected = left[self.rows] if selected else left
            assert (right.shape, right.dtype) == (expected.shape, expected.dtype), "the type of the result changed"
            size = max(float(expected.double().norm()), 0.1 * expected.numel() ** 0.5)
            error = float((right.double() - expected.double()).norm()) / size
            assert error <= TOLERANCE, f"relative RMSE {error:.1e}\n{text}"


def _content(graph: ir.Graph) -> tuple[object, ...]:
    """All that the text of a graph is made of; quicker to compare than texts."""
    nodes = [
        (node, node.name, node.target, node.args, node.kwargs, *map(node.meta.get, ("type", "source", "region")))
        for node in graph.nodes
    ]
    return nodes, dict(graph.dims), dict(graph.options), graph.name


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def check(recipe: Recipe, apply: Apply = apply_pass) -> None:
    """All that must hold for the graph of a recipe.

    Raises:
        Broken: names the pass.
    """
    trial = Trial(recipe, apply)
    trial.each_alone()
    trial.all_in_order()


def failure(recipe: Recipe, apply: Apply = apply_pass) -> Broken | None:
    try:
        check(recipe, apply)
    except Broken as broken:
        return broken
    return None


def broken_alone(recipe: Recipe, name: str, apply: Apply) -> Broken | None:
    """What is wrong with one pass on the graph of a recipe."""
    try:
        trial = Trial(recipe, apply)
        trial.after(name, trial.graph, trial.text, name)
    except Broken as broken:
        return broken
    return None


def report(recipe: Recipe, first: Broken, apply: Apply = apply_pass) -> str:
    """The seed, and the smallest graph found in which the same pass breaks."""
    name = first.site.partition(" ")[0]
    found = {recipe: first}

    def fails(smaller: Recipe) -> bool:
        broken = failure(smaller, apply)
        if broken is None or broken.site.partition(" ")[0] != name:
            return False
        found[smaller] = broken
        return True

    small = shrink(recipe, fails)
    return (
        f"seed {recipe.seed} breaks {first}\n\n"
        f"Smallest: {small}\n{found[small]}\nThe graph in front of the pass:\n{found[small].text}\n"
        f"Again: FUSELINE_RANDOM_SEED={recipe.seed} pytest tests/test_random_graphs.py -k 'hold and 0-'"
    )
