"""Tilings: which may be measured, which is chosen, and that a record is read back or measured anew."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from families import make
from traced import traced

from fuseline import passes
from fuseline.codegen import tuning
from fuseline.codegen.kernels import Kernel, emit_kernels
from fuseline.codegen.launch import kernel_path
from fuseline.codegen.offline import load_kernel_file
from fuseline.codegen.tuning import Timing, candidates, choose
from fuseline.ir.graph import Graph
from fuseline.ir.loop import Loop
from fuseline.ir.skeleton import skeleton
from fuseline.runtime import step_tuning, tune
from fuseline.runtime.constants import fold_constants
from fuseline.runtime.options import OptionError
from fuseline.runtime.replay import NotCapturable
from fuseline.runtime.step_tuning import choose_in_steps

CPU = torch.device("cpu")


@cache
def lowered() -> Graph:
    return passes.run(traced(skeleton(make("llama"), torch.bfloat16)))


def emitted() -> list[Kernel]:
    return emit_kernels(lowered())


def module_of(name: str) -> ModuleType:
    return load_kernel_file(kernel_path(next(kernel for kernel in emitted() if kernel.name == name)))


def block_of(module: ModuleType, index: int) -> int | None:
    """Rows of a tiling; 1 for the kernel of one row, nothing for the library."""
    config = module.CONFIGS[index]
    return config["constexprs"].get("BLOCK_M", 1) if config else None


def test_what_may_be_measured_depends_on_the_rows() -> None:
    module = module_of("down_proj")
    assert {block_of(module, index) for index in candidates(module, 1)} == {1}
    assert {block_of(module, index) for index in candidates(module, 4)} == {1, 8, 16}
    assert {block_of(module, index) for index in candidates(module, 16)} == {16}
    assert {block_of(module, index) for index in candidates(module, 64)} == {64, 128, None}
    assert {block_of(module, index) for index in candidates(module, 256)} == {64, 128, None}


def test_the_fastest_is_chosen_and_noise_changes_nothing() -> None:
    module = module_of("down_proj")
    own = dict(module.CHOICES)
    first, second = candidates(module, 1)[:2]
    assert own[1] == first
    slower = [Timing(1, first, 10.0), Timing(1, second, 9.0), Timing(8, 9, 5.0)]
    assert choose(module, slower) == ((1, second), (8, 9), *[pair for pair in module.CHOICES if pair[0] not in (1,)])
    alike = [Timing(1, first, 10.0), Timing(1, second, 9.95)]
    assert choose(module, alike) == tuple(module.CHOICES)


def test_every_number_of_rows_has_a_tiling() -> None:
    module = module_of("gate_up")
    found = choose(module, [Timing(rows, candidates(module, rows)[-1], 1.0) for rows in (1, 2, 4, 8, 16, 32)])
    bounds = [most for most, _ in found]
    assert bounds[-1] is None and bounds[:-1] == sorted(bounds[:-1])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the kernels that are measured: a stand-in takes one microsecond more for every further tiling."""
    names: list[str] = []

    def measure(module: ModuleType, arguments: Any, rows_of: Any) -> Iterator[Timing]:
        names.append(module.__name__)
        for rows in rows_of:
            for values in arguments(rows):
                assert all(value.shape for value in values)
            yield from (Timing(rows, config, 100.0 - config) for config in candidates(module, rows))

    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "machine_of", lambda device: {"gpu": "none"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield names


def tuned_model() -> tuple[Loop, Any]:
    loop = Loop.plain(lowered())
    weights = {name: value.detach().to(torch.bfloat16) for name, value in make("llama").state_dict().items()}
    weights |= dict(make("llama").named_buffers())
    return loop, fold_constants(loop, weights, CPU, {})


def tuned(seconds: float = 60.0) -> dict[str, Any]:
    loop, constants = tuned_model()
    found = tune.tune_kernels(emitted(), loop, constants, CPU, 8, time.perf_counter() + seconds)
    return {name: item.choices for name, item in found.items()}


def steps(times: dict[int, float]) -> Any:
    """A step takes what its two kernels take there, whatever they take alone."""
    return lambda choices, rows: sum(times[dict(pairs)[rows]] for pairs in choices.values())


def test_a_step_decides_between_those_that_are_alike_alone() -> None:
    choices = {"a": ((1, 0), (8, 0), (None, 9)), "b": ((1, 0), (8, 1), (None, 9))}
    alone = [Timing(rows, config, 10.0 + config) for rows in (1, 8) for config in range(5)]
    timings = {"a": alone, "b": alone}
    found, complete = choose_in_steps(choices, timings, steps({0: 5, 1: 4, 2: 3, 3: 4, 4: 1}), [8], math.inf)
    # Four is too slow alone to be a rival of nought; of one it is not.
    assert complete and found == {"a": ((1, 0), (8, 2), (None, 9)), "b": ((1, 0), (8, 2), (None, 9))}
    noise = steps({0: 5.0, 1: 4.999, 2: 4.998, 3: 5.1, 4: 6.0})
    assert choose_in_steps(choices, timings, noise, [1, 8], math.inf) == (choices, True)
    assert choose_in_steps(choices, timings, steps(dict.fromkeys(range(5), 1.0)), [1, 8], 0.0) == (choices, False)


@pytest.mark.parametrize("recordable", [True, False])
def test_steps_are_measured_once_where_they_can_be_recorded(
    recordable: bool, measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain calls stand in for CUDA graphs, and references for kernels."""
    trials: list[int] = []

    def replay(compute: Any, sizes: list[int], device: torch.device, stream: Any) -> Any:
        if not recordable:
            raise NotCapturable("in aten.item: waits")
        trials.extend(sizes)
        compute(sizes[0])
        return lambda size: None

    monkeypatch.setattr(step_tuning, "GraphReplay", replay)
    monkeypatch.setattr(step_tuning, "load_launches", lambda kernels, choices, exchange: {})
    monkeypatch.setattr(step_tuning, "median_milliseconds", lambda work, repeats, device: 1.0)
    loop, constants = tuned_model()
    tunings = tune.tune_kernels(emitted(), loop, constants, CPU, 2, math.inf)
    alone = {name: item.choices for name, item in tunings.items()}
    rest = (emitted(), loop, constants, CPU, 16, 40, math.inf)
    assert step_tuning.tune_steps(tunings, *rest) == alone
    assert (len(trials) > 3) == recordable
    count = len(trials)
    assert step_tuning.tune_steps(tunings, *rest) == alone and len(trials) == count
    assert len(list((tmp_path / "fuseline" / "tuning").glob("step_*.json"))) == recordable


def test_a_kernel_is_measured_once(measured: list[str], tmp_path: Path) -> None:
    first = tuned()
    assert set(first) == {"qkv", "o_proj", "gate_up", "down_proj", "lm_head"} and len(measured) == 5
    assert tuned() == first and len(measured) == 5
    (record,) = (tmp_path / "fuseline" / "tuning").glob("gate_up_*.json")
    assert json.loads(record.read_text())["machine"] == {"gpu": "none"}
    record.write_text("{")
    assert tuned() == first and len(measured) == 6


def test_another_machine_measures_anew(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned()
    monkeypatch.setattr(tune, "machine_of", lambda device: {"gpu": "another"})
    tuned()
    assert len(measured) == 10


def test_tilings_that_cannot_be_compiled_or_spill_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("down_proj")
    first, fails, spills, *more = candidates(module, 16)
    message = "PassManager::run failed"

    def launch(*values: torch.Tensor, choices: Any) -> SimpleNamespace:
        ((_, config),) = choices
        if config == fails:
            raise RuntimeError(message)
        return SimpleNamespace(n_spills=8 if config == spills else 0)

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(tuning, "_micros", lambda *args, **options: 1.0)
    assert [item.config for item in tuning.measure(module, lambda rows: [[torch.empty(0)]], [16])] == [first, *more]
    message = "an illegal memory access"
    with pytest.raises(RuntimeError, match="illegal"):
        list(tuning.measure(module, lambda rows: [[torch.empty(0)]], [16]))


def test_time_is_bounded(measured: list[str], tmp_path: Path) -> None:
    assert tuned(seconds=0.0) == {}
    assert not list((tmp_path / "fuseline" / "tuning").glob("*.json"))


def test_what_a_report_lists_is_replayed(measured: list[str], tmp_path: Path) -> None:
    choices = tuned()
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"tilings": tune.listed(choices, emitted())}))
    assert tune.replayed(report, emitted()) == choices
    changed = [Kernel(kernel.name, kernel.source + "#", kernel.graph) for kernel in emitted()]
    with pytest.raises(OptionError, match="its text has changed"):
        tune.replayed(report, changed)
    with pytest.raises(OptionError, match=r"no report\.json"):
        tune.replayed(tmp_path / "missing.json", emitted())
