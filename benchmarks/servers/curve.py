"""Draws latency against load from a comparison's raw results: `python benchmarks/servers/curve.py DIR FILE.png`.

Each point is a closed loop of as many connections as stand beside it, one row a request: p50 as a line, p99 dotted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from report import read

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by most eyes


def draw(folder: Path, picture: Path) -> None:
    measured = [each for each in read(folder) if each["status"] == "measured" and each["rows"] == 1]
    names = [name for name in dict.fromkeys(each["server"] for each in measured) if name != "null"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, colour in zip(names, COLOURS, strict=False):
        points = sorted((each for each in measured if each["server"] == name), key=lambda each: each["connections"])
        rates = [each["requests_per_s"] for each in points]
        axes.plot(rates, [each["p50_ms"] for each in points], "o-", color=colour, label=f"{name}, p50")
        axes.plot(rates, [each["p99_ms"] for each in points], "s:", color=colour, label=f"{name}, p99")
        for each, rate in zip(points, rates, strict=True):
            at = (rate, each["p50_ms"])
            axes.annotate(str(each["connections"]), at, xytext=(4, -11), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("requests/s answered (logarithmic); beside each point: connections")
    axes.set_ylabel("response time, ms (logarithmic)")
    axes.set_title("Latency against load over HTTP, requests of one image of 750 KB", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
