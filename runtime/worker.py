"""A rank that another process of this machine started: compiles the same model, and does what the first rank does."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

END = ["end", []]
"""What the first rank says last."""


def main() -> None:
    """Read the arguments of ``compile`` from stdin, then calls, until the first rank ends or is gone."""
    heard: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, heard), daemon=True).start()
    from .compile import compile
    from .mpi import RankError, one_job

    store, size, arguments = heard.get()
    with one_job(size):
        from .join import join

        device = join(store, int(os.environ["RANK"]), size, arguments["device"])
        compiled = compile(**{**arguments, "device": device})
        engine = compiled.engine
        calls: dict[str, Callable[..., Any]] = {
            name: getattr(engine, name) for name in ("add", "abort", "abort_all", "step", "score")
        }
        calls["decode_step_ms"] = compiled.decode_step_ms
        while (call := heard.get()) != END:
            name, values = call
            try:
                calls[name](*values)
            except RankError:
                raise
            except Exception as error:  # the first rank raises the same, and goes on; if it does not, it waits in vain
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stderr.flush()
    os._exit(0)  # what others still hold of the group is not waited for


def _listen(source: BinaryIO, heard: queue.Queue[Any]) -> None:
    """Hand on what the first rank says. If it is gone, this rank ends, whatever it waits for."""
    from .told import value_of

    for line in source:
        item = value_of(line)
        heard.put(item)
        if item == END:
            return
    os._exit(1)


if __name__ == "__main__":
    main()
