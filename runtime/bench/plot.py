"""The plot: share of the floor against batch size, a line for each participant, a panel for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import OptionError
from .peers import OURS
from .results import Measurement

_COLOURS = {
    OURS: "#c1121f",
    "vllm": "#1d4e89",
    "torch-compile": "#2a9d8f",
    "hf-batching": "#8d6a9f",
    "eager": "#7f7f7f",
}
_MARKERS = {OURS: "o", "vllm": "s", "torch-compile": "^", "hf-batching": "D", "eager": "v"}


def draw(items: Sequence[Measurement], out: Path) -> None:
    """Write a PNG of the decode measurements. Where one was measured several times, the last counts.

    Raises:
        OptionError: there is nothing to draw, ``out`` is no PNG, or matplotlib is not installed.
    """
    if out.suffix != ".png":
        raise OptionError(f"--plot {out}: the name of the picture must end with .png")
    panels = _panels(items)
    if not panels:
        raise OptionError("there is nothing to draw: no file holds a decode measurement with its share of the floor")
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError("a plot needs matplotlib; run: pip install 'fuseline[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.2 + 5.2 * len(panels), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ((model, kind, device), lines) in zip(axes[0], panels.items()):
        _panel(axis, f"{model}, {kind}\n{device}", lines)
    axes[0][0].set_ylabel("share of the copy bandwidth (%)")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    columns = 3 * len(panels)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    figure.savefig(out, dpi=160)
    pyplot.close(figure)


Panels = dict[tuple[str, str, str], dict[str, dict[int, float]]]


def _panels(items: Sequence[Measurement]) -> Panels:
    """Per cent by model, participant and batch; Fuseline first, then the others as they come."""
    panels: Panels = {}
    for item in sorted(items, key=lambda item: item.who != OURS):
        if item.workload == "decode" and item.share is not None:
            where = (item.model.removeprefix("shape:"), item.dtype, str(item.machine.get("device", "")))
            panels.setdefault(where, {}).setdefault(item.who, {})[item.batch] = 100 * item.share
    return panels


def _panel(axis: Any, title: str, lines: dict[str, dict[int, float]]) -> None:
    for who, points in lines.items():
        batches = sorted(points)
        shares = [points[batch] for batch in batches]
        ours = who == OURS
        axis.plot(
            batches,
            shares,
            label=who,
            color=_COLOURS.get(who),
            marker=_MARKERS.get(who, "x"),
            linewidth=2.4 if ours else 1.5,
            markersize=6,
            clip_on=False,
            zorder=3 if ours else 2,
        )
        if ours:
            for batch, share in zip(batches, shares):
                axis.annotate(
                    f"{share:.0f} %",
                    (batch, share),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    color=_COLOURS[who],
                )
    every = sorted({batch for points in lines.values() for batch in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, [str(batch) for batch in every])
    axis.minorticks_off()
    axis.set_xlim(every[0] / 1.5, every[-1] * 1.5)
    axis.set_ylim(0, max(105.0, 1.1 * max(max(points.values()) for points in lines.values())))
    axis.axhline(100, color="black", linewidth=0.8, linestyle="--", label="copy bandwidth")
    axis.set_xlabel("batch (sequences)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
