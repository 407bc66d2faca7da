"""Draw what the GPU's streams did in a few milliseconds of a profiled run: `python benchmarks/timeline.py RUN OUT.png`.

RUN is the folder of a run made with `--profile`. Source of the times: the profiler's records of the device (CUPTI).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from headrace.report.spans import Span, busiest_window, device_timeline, find_trace, read_spans

KINDS = {"copy in": "#d95f02", "compute": "#1b9e77", "copy out": "#7570b3"}


def draw(spans: list[Span], begin_us: float, length_us: float, title: str, target: Path) -> None:
    """Write the picture: a line for each stream, and below it what ran at all."""
    timeline = device_timeline(spans, begin_us, length_us)
    streams = list(timeline.rows)
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.45 * len(streams)), dpi=130)
    for line, stream in enumerate(streams):
        for kind, colour in KINDS.items():
            bars = [
                ((s.begin_us - begin_us) / 1000, s.length_us / 1000)
                for s in timeline.spans
                if s.stream == stream and s.kind == kind
            ]
            axes.broken_barh(bars, (line - 0.35, 0.7), facecolors=colour, edgecolor="none")
    axes.set_yticks(range(len(streams)), list(timeline.rows.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, length_us / 1000)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    axes.legend(handles, KINDS, loc="upper right", ncols=3, fontsize=8, bbox_to_anchor=(1, 1.22), frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--milliseconds", type=float, default=8.0)
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    options = summary["options"]
    trace = find_trace(args.run)
    if trace is None:
        parser.error(f"{args.run}: holds no trace; run again with --profile")
    spans = read_spans(trace)
    length_us = args.milliseconds * 1000
    title = (
        f"{summary['experiment']}, batch {options['inputs']['batch_size']}, {options['model']['precision']},"
        f" {summary['environment']['gpu_name']}"
    )
    draw(spans, busiest_window(spans, length_us), length_us, title, args.target)


if __name__ == "__main__":
    main()
