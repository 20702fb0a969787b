"""Other processes compile kernels into Triton's cache, under the very keys by which a launch looks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuseline.codegen import precompile

# Stands in for a machine with a GPU: kernels can be asked for there, though not be launched.
SCRIPT = """\
import os
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fuseline import ir
from fuseline.codegen.compiler_process import Elsewhere
from fuseline.codegen.exchange import MirrorExchange, Places
from fuseline.codegen.kernels import Kernel, kernel_file
from fuseline.codegen.launch import kernel_path
from fuseline.codegen.offline import load_kernel_file
from fuseline.codegen.precompile import Compilers, Wanted
from fuseline.codegen.tuning import candidates, wanted

GRAPH = '''\\
def down(x: bf16[T, 128], w: bf16[64, 128], r: bf16[T, 64], *, T: dim(1, 64)):
    y: bf16[T, 64] = aten.linear(x, w)
    z: bf16[T, 64] = aten.add.Tensor(r, y)
    return [z]
'''
SENDING = '''\\
def sent(x: bf16[T, 128], w: bf16[64, 128], *, T: dim(1, 64)):
    y: bf16[T, 64] = aten.linear(x, w)
    z: bf16[T, 64] = dist.send(y, 2)
    return [z]
'''


class Gpu(Elsewhere):
    def get_current_stream(self, device):
        return 0


def cached():
    return sorted(path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*"))


driver.set_active(Gpu(GPUTarget("cuda", 90, 32)))


def loaded(text):
    graph = ir.parse(text)
    module = load_kernel_file(kernel_path(Kernel(graph.name, kernel_file(graph), graph)))
    module.CONFIGS = module.CONFIGS[:2]  # enough
    return module


def arguments(rows, results=2):
    shapes = ((rows, 128), (64, 128), *[(rows, 64)] * results)
    return [[torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]]


module = loaded(GRAPH)
assert candidates(module, 1) == [0, 1]
found = wanted(module, arguments, [1])
assert len(found) == 2 and not cached(), found
with Compilers(share=os.cpu_count()) as compilers:  # one process
    broken = compilers.compile(Wanted(found[0].module, found[0].kernel, "{}"))
    asked = [compilers.compile(item) for item in found]
    assert asked[0] is compilers.compile(found[0])
    assert not broken.result()  # and it goes on
    assert all(item.result() for item in asked)
    for process in compilers.processes:
        process.kill()
    assert not compilers.compile(Wanted(found[0].module, found[0].kernel, "[]")).result()
before = cached()
assert len(before) >= 2
for item in found:
    getattr(module, item.kernel).preload(item.specialisation)  # what a launch compiles
assert cached() == before

# A kernel that sends in steps, whatever their number of meetings, and is measured without.
sender = loaded(SENDING)
alone = wanted(sender, lambda rows: arguments(rows, 1), [1])
few, many = (MirrorExchange(Places(2, 64, meetings), "cpu") for meetings in (4, 16))
both = wanted(sender, lambda rows: arguments(rows, 1), [1], few)
assert len(alone) == 2 and len(both) == 4 and set(alone) < set(both), both
assert set(both) == set(wanted(sender, lambda rows: arguments(rows, 1), [1], many))
print("fine")
"""


def test_what_others_compile_is_found(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = Path(__file__).parent.parent / ".src"
    environment |= {"PYTHONPATH": str(source), "XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "t")}
    (tmp_path / "t").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_compilers_may_run_where_their_rank_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    every = os.sched_getaffinity(0)
    monkeypatch.setattr(precompile.Compilers, "_target", staticmethod(lambda: ["cuda", 90, 32]))
    os.sched_setaffinity(0, {min(every)})  # as a launcher does
    try:
        with precompile.Compilers() as alone:
            assert [os.sched_getaffinity(process.pid) for process in alone.processes] == [{min(every)}]
        with precompile.Compilers(bound=True) as spread:
            assert [os.sched_getaffinity(process.pid) for process in spread.processes] == [every] * min(16, len(every))
        assert os.sched_getaffinity(0) == {min(every)}
    finally:
        os.sched_setaffinity(0, every)
