"""A process that compiles kernels for a GPU it does not touch; see ``precompile.py``, which starts it.

It is run as a file and imports nothing of this package, so that it is ready soon: its argument is Triton's target as JSON,
each line of stdin asks for one kernel, and each line of stdout says whether it is in Triton's cache now.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

DONE = "done\n"


class Elsewhere:
    """Stands for the driver of the GPU that is compiled for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _loaded(module: str, path: str) -> Any:
    """The kernel file as a module of that name, which is part of what a kernel is known by."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        sys.modules[module] = loaded
    return sys.modules[module]


def main() -> None:
    import torch  # noqa: F401 - kernel files do, and nobody waits for it yet
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    answers, sys.stdout = sys.stdout, sys.stderr
    driver.set_active(Elsewhere(GPUTarget(*json.loads(sys.argv[1]))))
    for line in sys.stdin:
        module, path, kernel, specialisation = json.loads(line)
        try:
            getattr(_loaded(module, path), kernel).preload(specialisation)
            answer = DONE
        except Exception as error:  # who launches the kernel will meet it again
            answer = f"{type(error).__name__}: {error}".splitlines()[0] + "\n"
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    main()
