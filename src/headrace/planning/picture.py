"""A plan as a picture, with matplotlib where it is installed (the extra `plots`): latency against rate, and ECDF."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.planning.plan import CapacityPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00")
BOUND = "#CC79A7"
DPI = 140


def draw(plan: CapacityPlan, path: Path) -> bool:
    """Draw the plan; return whether matplotlib is there to do it. Raises OSError."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # noqa: PLC0415  optional, and slow to import

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    figure.suptitle(f"Predicted with {plan.choices[0].setup.words} on each GPU", fontsize=12, fontweight="bold")
    by_rate, ecdf = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_rates(by_rate, plan)
    _draw_ecdf(ecdf, plan)
    figure.savefig(path, dpi=DPI)
    return True


def gpu_counts(gpus: int) -> list[int]:
    """Return the numbers of GPUs that are drawn: half, the plan's, and up to twice of it."""
    return sorted({max(1, gpus // 2), max(1, gpus * 3 // 4), gpus, gpus * 3 // 2 or 1, gpus * 2})


def _draw_rates(axes: Axes, plan: CapacityPlan) -> None:
    for number, gpus in enumerate(gpu_counts(plan.fleets[0].gpus)):
        rates = [rate * gpus for rate in plan.curve]
        times = [seconds * 1e3 for seconds in plan.curve.values()]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(rates, times, marker="o", markersize=4, color=colour, label=f"{gpus:,} GPUs")
    axes.axhline(plan.ask.bound_s * 1e3, color=BOUND, linestyle="--", label=f"bound, {plan.ask.bound_s * 1e3:g} ms")
    axes.axvline(plan.ask.rate, color="#999999", linestyle=":", label=f"{plan.ask.rate:,.0f} requests/s")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", rotation=20)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("requests/s of all GPUs")
    axes.set_ylabel("p99 in ms (logarithmic)")
    axes.set_title("Latency against rate", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _draw_ecdf(axes: Axes, plan: CapacityPlan) -> None:
    latency = plan.choices[0].latency.ecdf
    axes.plot(
        [seconds * 1e3 for seconds in latency.values()], [float(at) for at in latency], color=COLOURS[0], marker="o"
    )
    axes.axvline(plan.ask.bound_s * 1e3, color=BOUND, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("ms (logarithmic)")
    axes.set_ylabel("% of requests within")
    axes.set_title("Distribution of latency at one GPU's rate", fontsize=10)
    axes.grid(alpha=0.3)
