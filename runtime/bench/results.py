"""What comes out of a measurement: one JSON line each, and the lines of a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..options import OptionError


@dataclass
class Measurement:
    """One workload by one participant; what was not measured is ``None``.

    model, dtype, who  what ran, and by whom
    workload, label    its name, and its name with sizes
    batch              sequences at a time, or requests in all
    ms                 milliseconds: of a decode step, a prefill, all requests (mixed), a token (rates), the start-up
    tokens_per_s       tokens generated a second; of a prefill, tokens read
    share              of the floor: of the copy bandwidth (decode) or the matmul rate (prefill) of the same run
    floor_ms           milliseconds at the whole of that rate
    runs               the ``ms`` of each repeat, of which the median counts
    check              how its tokens compare with those of the model; ``right`` is false if they cannot be right
    note               why nothing was measured
    details            more by name: ``ttft_ms`` and ``tpot_ms`` as [median, p99], ``graph_ms``, ``steps``, ``warm_up_s``
    machine            device, versions, date, command, and the rates measured in the same run
    """

    model: str
    dtype: str
    who: str
    workload: str
    label: str
    batch: int = 0
    ms: float | None = None
    tokens_per_s: float | None = None
    share: float | None = None
    floor_ms: float | None = None
    runs: list[float] = field(default_factory=list)
    check: str = ""
    right: bool = True
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read(paths: Iterable[Path]) -> list[Measurement]:
    """The measurements in files of JSON lines.

    Raises:
        OptionError: a file cannot be read, or holds something else; names the line.
    """
    found = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{path}: cannot be read: {error}; give a file that bench --json wrote") from error
        for number, line in enumerate(lines, 1):
            try:
                found.append(Measurement(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise OptionError(
                    f"{path}:{number} is no measurement ({error}); give what bench --json wrote"
                ) from error
    return found


def machine(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """Where and with what: device (of one of several ``ranks``), versions, date (UTC), command."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()}
    for package in ("fuseline", "torch", "triton", "transformers", "vllm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    now = datetime.datetime.now(datetime.UTC)
    command = " ".join(["fuseline", *sys.argv[1:]])
    several = {"ranks": ranks} if ranks > 1 else {}
    return {"device": name, **several, **versions, "date": f"{now:%Y-%m-%d %H:%M} UTC", "command": command}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(facts: dict[str, Any]) -> str:
    """The lines above a table."""
    versions = [
        f"{name} {facts[name]}" for name in ("fuseline", "torch", "triton", "transformers", "vllm") if name in facts
    ]
    rates = f"copy {facts['copy_GB_s']:,.0f} GB/s (read + written), matmul {facts['matmul_TFLOP_s']:,.3g} TFLOP/s"
    if "ranks" in facts:
        rates += f" for each of {facts['ranks']} ranks,"
    return "\n".join(
        [f"{facts['date']}  {facts['command']}", facts["device"], ", ".join(versions), f"{rates} in the same run"]
    )


_DETAILS = {
    "ttft_ms": "TTFT {} ms",
    "tpot_ms": "TPOT {} ms",
    "graph_ms": "graph {} ms",
    "steps": "{} steps",
    "warm_up_s": "warm-up {} s",
}
COLUMNS = f"{'workload':<30}{'who':<15}{'ms':>12}{'tokens/s':>12}{'of floor':>14}  tokens as the model / more"


def row(item: Measurement) -> str:
    """A measurement as a line of the table whose head is ``COLUMNS``."""
    begin = f"{item.label:<30}{item.who:<15}"
    if item.ms is None:
        return f"{begin}not measured: {item.note}"
    speed = f"{item.tokens_per_s:,.1f}" if item.tokens_per_s is not None else ""
    of = {"prefill": "matmul"}.get(item.workload, "copy")
    share = f"{100 * item.share:.1f} % {of}" if item.share is not None else ""
    more = [("" if item.right else "WRONG: ") + item.check] if item.check else []
    more += [_DETAILS.get(name, name + " {}").format(_plain(value)) for name, value in item.details.items()]
    return f"{begin}{_plain(item.ms):>12}{speed:>12}{share:>14}  {'; '.join(more)}".rstrip()


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
