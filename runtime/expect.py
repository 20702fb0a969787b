"""What a caller demands of a compile: how often passes fuse, and how many kernels a layer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.errors import ExpectationError
from ..passes import Refusal
from .report import Report

KERNELS_PER_LAYER = "kernels_per_layer"
_SHOWN = 8  # refused sites in a message; the report holds them all


def check_expectations(expect: Mapping[str, int], report: Report) -> None:
    """Compare what was demanded with what happened.

    Args:
        expect: by the name of a pass, the number of sites it must have fused; under ``"kernels_per_layer"`` the number
            of kernels of every layer.

    Raises:
        ExpectationError: shows the sites that were refused, or missed by little, with the graph lines that stood in the way.
    """
    for name, wanted in expect.items():
        if name == KERNELS_PER_LAYER:
            _check_kernels(wanted, report)
        else:
            _check_pass(name, wanted, report)


def _check_pass(name: str, wanted: int, report: Report) -> None:
    mine = [entry for entry in report.passes if entry.name == name]
    if not mine:
        ran = ", ".join(sorted({entry.name for entry in report.passes}))
        raise ExpectationError(f"expect={{{name!r}: {wanted}}}: no pass of that name ran; there are {ran}")
    found = sum(len(entry.fused) for entry in mine)
    if found == wanted:
        return
    refused = [item for entry in mine for item in entry.refused]
    near = [item for entry in mine for item in entry.near]
    detail = _listing("Refused", refused) + _listing("Almost fitted", near)
    nothing = "\nNo other site was refused or came near: its pattern is nowhere else in the graph."
    raise ExpectationError(f"{name} was to fuse {wanted} sites and fused {found}.{detail or nothing}")


def _check_kernels(wanted: int, report: Report) -> None:
    wrong = {layer: names for layer, names in report.layer_kernels.items() if len(names) != wanted}
    if not wrong and report.layer_kernels:
        return
    if not report.layer_kernels:
        raise ExpectationError(f"expect={{{KERNELS_PER_LAYER!r}: {wanted}}}: the graph has no layers with kernels")
    layer, names = next(iter(wrong.items()))
    entries = [entry for entry in report.passes if entry.name == "GroupKernels"]
    refused = [item for entry in entries for item in entry.refused if item.site.startswith(f"l{layer}_")]
    raise ExpectationError(
        f"layer {layer} was to take {wanted} kernels and takes {len(names)}: {', '.join(names)}"
        f"{_listing('What ended a kernel there', refused)}"
    )


def _listing(title: str, items: Sequence[Refusal]) -> str:
    if not items:
        return ""
    shown = "\n".join(f"{item}" for item in items[:_SHOWN])
    rest = f"\n... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"\n{title}:\n{shown}{rest}"
