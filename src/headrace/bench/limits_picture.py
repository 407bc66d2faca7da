"""The limits as a picture, with matplotlib where it is installed (the extra `plots`)."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.bench.limits_report import RING, BatchLimits, LimitsReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "compute": "#0072B2",
    "copy in": "#E69F00",
    "copy out": "#56B4E9",
    "host memory": "#009E73",
    RING: "#999999",
}
LABELS = {
    "compute": "the model alone, best number of streams",
    "copy in": "copies to the device",
    "copy out": "copies from the device",
    "host memory": "copies within the host's memory (a client that copies)",
    RING: "ring messages, one batch in each",
}
MARKERS = "osD^vPX*"
DPI = 140
TITLE_WIDTH = 120  # characters that fit in one line


def draw(report: LimitsReport, path: Path) -> bool:
    """Draw the limits beside the forward rates; return whether matplotlib is there to do it. Raises OSError."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # noqa: PLC0415  optional, and slow to import
    from matplotlib.patches import Patch  # noqa: PLC0415

    bars = sum(len(each.samples_per_s) for each in report.batches)
    figure = Figure(figsize=(13, max(4.6, 1.9 + 0.3 * bars)), layout="constrained")
    title = textwrap.fill(f"What no server can exceed: {report.title}", TITLE_WIDTH)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    limits, forward = figure.subplots(1, 2, width_ratios=(1.45, 1))
    _draw_limits(limits, report.batches)
    _draw_forward(forward, report.batches)
    names = [name for name in COLOURS if any(name in each.samples_per_s for each in report.batches)]
    patches = [Patch(color=COLOURS[name], label=LABELS[name]) for name in names]
    figure.legend(handles=patches, loc="outside lower left", fontsize=9, ncols=2, frameon=False)
    figure.savefig(path, dpi=DPI)
    return True


def _draw_limits(axes: Axes, batches: Sequence[BatchLimits]) -> None:
    """Draw a group of bars for each batch size, the smallest limit marked."""
    at, ticks = 0.0, []
    largest = max(max(each.samples_per_s.values()) for each in batches)
    smallest = min(each.binding.samples_per_s for each in batches)
    for each in batches:
        ticks.append(at + (len(each.samples_per_s) - 1) / 2)
        for name, rate in each.samples_per_s.items():
            binds = name == each.binding.name
            edge = "black" if binds else "none"
            axes.barh(at, rate, height=0.82, color=COLOURS[name], edgecolor=edge, linewidth=2)
            text = f" {_short(rate)}" + (", binds" if binds else "")
            axes.text(rate, at, text, va="center", fontsize=9, fontweight="bold" if binds else "normal")
            at += 1
        at += 0.9
    axes.set_xscale("log")
    axes.set_xlim(smallest / 4, largest * (largest / smallest) ** 0.3 * 2)  # room for the numbers
    axes.set_yticks(ticks, [f"batch {each.measured.bucket}" for each in batches])
    axes.invert_yaxis()
    axes.set_xlabel("samples/s (logarithmic)")
    axes.set_title("Limits by batch size; framed: the one that binds", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_forward(axes: Axes, batches: Sequence[BatchLimits]) -> None:
    """Draw the model alone against the number of streams."""
    counts = sorted({count for each in batches for count in each.measured.forward_samples_per_s})
    for number, each in enumerate(batches):
        rates = each.measured.forward_samples_per_s
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(list(rates), list(rates.values()), marker=marker, label=f"batch {each.measured.bucket}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(max(each.measured.forward_samples_per_s.values()) for each in batches))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("streams")
    axes.set_ylabel("samples/s")
    axes.set_title("The model alone, on data that is on the device", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _short(rate: float) -> str:
    """Return three digits and k or M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.3g}"
