"""The memory that is planned before weights are placed is what is used afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import REQUIRED, make

import fuseline
from fuseline.ir.interpret import bind_dims
from fuseline.ir.loop import Loop
from fuseline.runtime.caches import new_caches
from fuseline.runtime.choices import Choices
from fuseline.runtime.constants import fold_constants
from fuseline.runtime.executor import Executor
from fuseline.runtime.memory import Load, activation_bytes, constant_bytes, plan_memory
from fuseline.runtime.rehearsal import rehearse
from fuseline.runtime.selfcheck import step_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=REQUIRED)
def compiled(request: pytest.FixtureRequest) -> tuple[Any, fuseline.CompiledModel]:
    model = make(request.param)
    return model, fuseline.compile(model, device="cpu", max_seq_len=64)


def storage_bytes(values: Any) -> int:
    found = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in values}
    return sum(found.values())


def test_weights_take_what_was_planned(compiled: tuple[Any, fuseline.CompiledModel]) -> None:
    """Given on another device than they go to, as it is with a GPU: nothing is shared, and each is copied once."""
    model, done = compiled
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    weights = {name: item.detach().clone() for name, item in named}
    loop = Loop.plain(done.graph)
    constants = [item for items in fold_constants(loop, weights, CPU, {}).values() for item in items]
    kept, shared, placing = constant_bytes(loop, weights, torch.device("meta"))
    assert kept.total() == storage_bytes(constants) == done.report.weight_bytes
    assert shared == 0 and kept.total() <= placing <= 1.5 * kept.total()
    kept, shared, placing = constant_bytes(loop, weights, CPU)
    given = {item.data_ptr() for item in weights.values()}
    assert shared == sum(item.nbytes for item in constants if item.data_ptr() in given)
    assert placing >= kept.total() - shared


def test_steps_take_what_was_planned(compiled: tuple[Any, fuseline.CompiledModel]) -> None:
    """Every value of a step, weighed after each operator, against the walk through the graph."""
    model, done = compiled
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    loop = Loop.plain(done.graph)
    constants = fold_constants(loop, {name: item.detach() for name, item in named}, CPU, {})
    step, slots = step_of([[5] * 30, [7] * 20], 16, CPU), 16 * 16
    executor = Executor(loop, constants, new_caches(loop, slots, CPU), CPU)
    values: list[Any] = [None] * len(executor._slots)
    (stage,) = executor._stages
    for slot, value in stage.fixed[0]:
        values[slot] = value
    for slot, name in executor._inputs:
        values[slot] = getattr(step, name)
    outside = {item.untyped_storage().data_ptr() for item in values if item is not None}
    most = 0
    for instruction in stage.instructions:
        instruction(values, bind_dims(done.graph, vars(step)))
        flat = [part for item in values for part in (item if isinstance(item, (tuple, list)) else [item])]
        mine = [item for item in flat if item is not None and item.untyped_storage().data_ptr() not in outside]
        most = max(most, storage_bytes(mine))
    planned = activation_bytes(loop, (), {"T": 50, "S": 2, "R": 50, "B": 2})
    assert most <= planned <= 1.05 * most


def test_the_cache_gets_what_weights_and_steps_leave() -> None:
    model = make("llama")
    done = fuseline.compile(model, device="cpu", max_seq_len=64)
    options: dict[str, Any] = {"launched": (), "weights": {}, "place": CPU, "load": Load(64, 4, True), "block_size": 16}
    loop = Loop.plain(done.graph)
    whole = plan_memory(loop, most_blocks=100, budget=None, **options)
    assert whole.blocks == 100
    assert whole.cache == 101 * whole.block_bytes
    assert whole.total == whole.weights + whole.cache + whole.workspace + whole.graphs
    room = whole.total - 50 * whole.block_bytes
    assert plan_memory(loop, most_blocks=100, budget=room, **options).blocks == 50
    assert plan_memory(loop, most_blocks=100, budget=room, **options).total == room
    with pytest.raises(fuseline.runtime.options.OptionError, match="does not fit"):
        plan_memory(loop, most_blocks=100, budget=whole.weights, **options)


def test_the_report_states_the_plan() -> None:
    done = fuseline.compile(make("llama"), device="cpu", max_seq_len=64)
    facts = done.report.as_dict()
    assert facts["planned_bytes"] == facts["weight_bytes"] + facts["kv_cache"]["bytes"] + facts["workspace_bytes"]
    assert facts["measured_bytes"] is None
    assert "MB planned" in str(done.report)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "half"])
def test_a_share_of_the_memory_is_a_share(share: Any) -> None:
    with pytest.raises(fuseline.runtime.options.OptionError, match="memory_share"):
        fuseline.compile(make("llama"), device="cpu", kv_cache=fuseline.KVCacheConfig(memory_share=share))


@pytest.mark.parametrize(("tokens", "batch"), [(1, 4), (7, 4), (64, 1), (128, 2), (90, 8)])
def test_the_largest_step_is_one_that_may_come(tokens: int, batch: int) -> None:
    """As many tokens and rows as planned, no position past what the model knows, and nothing but padding written."""
    done = fuseline.compile(make("gpt2"), device="cpu", max_seq_len=64, max_batch_size=batch, dtype=torch.float32)
    executor, seen = done.engine._runner.model, []

    def model(step: Any) -> torch.Tensor:
        seen.append(step)
        return executor(step)

    scratch = done.engine.pool.num_blocks
    rehearse(model, Load(tokens, batch, False), 16, scratch, Choices(8, CPU, done.engine.vocabulary))
    (step,) = seen
    assert len(step.tokens) == tokens and len(step.rows) == min(batch, tokens)
    assert int(step.positions.max()) < 64
    assert set(step.slots.tolist()) == {scratch * 16}
    assert step.query_starts[-1] == tokens and torch.equal(step.query_starts.diff(), step.context_lens)


def test_a_decode_step_is_timed_on_any_device() -> None:
    done = fuseline.compile(make("llama"), device="cpu", max_seq_len=64, max_batch_size=3)
    assert 0 < done.decode_step_ms(3, 64, repeats=2) < 1000
    wanted = done.generate([[1, 2, 3]], max_new_tokens=5)
    assert done.decode_step_ms(1, 5, repeats=2) > 0
    assert done.generate([[1, 2, 3]], max_new_tokens=5) == wanted
    for wrong in ((0, 5), (4, 5), (1, 0), (1, 65)):
        with pytest.raises(fuseline.InvalidRequestError, match="no decode step"):
            done.decode_step_ms(*wrong)
    done.engine.add([1, 2, 3])
    with pytest.raises(fuseline.InvalidRequestError, match="in flight"):
        done.decode_step_ms(1, 5)
