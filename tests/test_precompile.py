"""Other processes compile kernels into Triton's cache, under the very keys by which a launch looks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


class Gpu(Elsewhere):
    def get_current_stream(self, device):
        return 0


def cached():
    return sorted(path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*"))


driver.set_active(Gpu(GPUTarget("cuda", 90, 32)))
graph = ir.parse(GRAPH)
module = load_kernel_file(kernel_path(Kernel(graph.name, kernel_file(graph), graph)))
module.CONFIGS = module.CONFIGS[:2]  # enough


def arguments(rows):
    shapes = ((rows, 128), (64, 128), (rows, 64), (rows, 64))
    return [[torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]]


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
