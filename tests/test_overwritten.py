"""Results that are written over a value which is read for the last time: nothing that is still read is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep import make_deep
from families import REQUIRED

from fuseline.codegen.kernels import Kernel
from fuseline.codegen.region import RegionView, regions_of
from fuseline.codegen.reuse import overwritable
from fuseline.codegen.signature import fresh_outputs
from fuseline.ir.interpret import interpret
from fuseline.ir.ops import op_name
from fuseline.ir.parse import parse
from fuseline.ir.skeleton import skeleton
from fuseline.runtime.caches import new_caches
from fuseline.runtime.constants import fold_constants
from fuseline.runtime.executor import Executor
from fuseline.runtime.liveness import overwritten
from fuseline.runtime.lower import Wishes, lower
from fuseline.runtime.options import KVCacheConfig, resolve
from fuseline.runtime.report import Report
from fuseline.runtime.selfcheck import step_of

CPU = torch.device("cpu")


def by_reference(kernel: Kernel) -> Any:
    """A launcher that computes the region as its kernel would, and then writes all results."""
    inputs, fresh = kernel.graph.inputs(), fresh_outputs(kernel.graph)
    results: Any = kernel.graph.output_node().args[0]

    def launch(*values: torch.Tensor) -> None:
        found = dict(zip(results, interpret(kernel.graph, {node.name: x for node, x in zip(inputs, values)}, {})))
        for node, place in zip(fresh, values[len(inputs) :]):
            place.copy_(found[node])

    return launch


@pytest.mark.parametrize("name", [*REQUIRED, "phi", "gpt_neox", "olmo2", "cohere"])
def test_a_step_computes_the_same(name: str) -> None:
    model = make_deep(name, 7)
    options = resolve(model.config.get_text_config(), CPU, torch.float32, 4, 64, 64, KVCacheConfig())
    bones = skeleton(model, torch.float32)
    lowered = lower(bones, options, Wishes(), Report("cpu", "float32"))
    loop = lowered.loop
    constants = fold_constants(loop, bones.load(), CPU, {})
    launches = {region: by_reference(kernel) for kernel in lowered.kernels for region in kernel.regions}
    step = step_of([[5, 7, 11] * 6, [3] * 9], 16, CPU)
    plain = Executor(loop, constants, new_caches(loop, 8 * 16, CPU), CPU)(step)
    for _ in range(2):
        found = Executor(loop, constants, new_caches(loop, 8 * 16, CPU), CPU, launches)(step)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 7])
def test_a_layer_of_a_llama_adds_in_place(layers: int) -> None:
    model = make_deep("llama", layers)
    options = resolve(model.config.get_text_config(), CPU, torch.float32, 4, 64, 64, KVCacheConfig())
    loop = lower(skeleton(model, torch.float32), options, Wishes(), Report("cpu", "float32")).loop
    views = {view.region: view for view in regions_of(loop.graph)}
    sums = [
        node for node in loop.graph.calls() if op_name(node.target) == "aten.add.Tensor" and node.meta.get("region")
    ]
    # After a loop the first sum keeps what the loop left: its last turn is no other value than those before.
    assert len(sums) - (layers > 2) <= len(overwritten(loop, views)) <= len(sums)


HEAD = "def block(x: f32[T, 8], r: f32[T, 8], w: f32[8, 8], s: f32[8], *, T: dim(1, 64)):\n"


def view_of(body: str) -> RegionView:
    (view,) = regions_of(parse(f"{HEAD}{body}"))
    return view


SUM = """\
    with kernel("sum"):
        a: f32[T, 8] = aten.linear({rows}, w)
        b: f32[T, 8] = aten.add.Tensor({left}, {right})
    return b
"""


@pytest.mark.parametrize(
    ("rows", "left", "right", "expected"),
    [
        ("x", "r", "a", {"b": "r"}),
        ("x", "a", "r", {"b": "r"}),
        ("r", "r", "a", {}),  # other programs read all of the row
        ("x", "a", "a", {}),
        ("x", "a", "s", {}),  # added to every row
    ],
)
def test_which_inputs_may_be_overwritten(rows: str, left: str, right: str, expected: dict[str, str]) -> None:
    found = overwritable(view_of(SUM.format(rows=rows, left=left, right=right)))
    assert {result.name: source.name for result, source in found.items()} == expected


def test_an_input_that_is_normed_on_the_way_stays() -> None:
    body = """\
    with kernel("sum"):
        n: f32[T, 8] = nn.rms_norm(r, s, 1e-05)
        a: f32[T, 8] = aten.linear(n, w)
        b: f32[T, 8] = aten.add.Tensor(r, a)
    return b
"""
    assert overwritable(view_of(body)) == {}
