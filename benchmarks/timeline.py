"""Draw what the GPU's streams did in a few milliseconds of a profiled run: `python benchmarks/timeline.py RUN OUT.png`.

RUN is the folder of a run made with `--profile`. Source of the times: the profiler's records of the device (CUPTI).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"copy in": "#d95f02", "compute": "#1b9e77", "copy out": "#7570b3"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that the device did, in microseconds of the trace."""

    kind: str
    stream: int
    begin_us: float
    length_us: float


def read_spans(trace: Path) -> list[Span]:
    """Return the device's copies and kernels, in order of time."""
    spans = []
    for event in json.loads(trace.read_text())["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        if category == "kernel":
            kind = "compute"
        elif category == "gpu_memcpy" and "HtoD" in name:
            kind = "copy in"
        elif category == "gpu_memcpy" and "DtoH" in name:
            kind = "copy out"
        else:
            continue
        spans.append(Span(kind, int(event["args"]["stream"]), float(event["ts"]), float(event["dur"])))
    return sorted(spans, key=lambda span: span.begin_us)


def busiest_window(spans: list[Span], length_us: float) -> float:
    """Return where the last window of that length begins that ends while copies in still come."""
    last_copy = max(span.begin_us for span in spans if span.kind == "copy in")
    return last_copy - 1.5 * length_us


def draw(spans: list[Span], begin_us: float, length_us: float, title: str, target: Path) -> None:
    """Write the picture: a line for each stream, and below it what ran at all."""
    shown = [s for s in spans if s.begin_us + s.length_us >= begin_us and s.begin_us <= begin_us + length_us]
    streams = sorted({span.stream for span in shown})
    names = {stream: _name(stream, shown) for stream in streams}
    streams.sort(key=lambda stream: (names[stream] != "copies in", stream))
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.45 * len(streams)), dpi=130)
    for line, stream in enumerate(streams):
        for kind, colour in KINDS.items():
            bars = [
                ((s.begin_us - begin_us) / 1000, s.length_us / 1000)
                for s in shown
                if s.stream == stream and s.kind == kind
            ]
            axes.broken_barh(bars, (line - 0.35, 0.7), facecolors=colour, edgecolor="none")
    axes.set_yticks(range(len(streams)), [names[stream] for stream in streams])
    axes.invert_yaxis()
    axes.set_xlim(0, length_us / 1000)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    axes.legend(handles, KINDS, loc="upper right", ncols=3, fontsize=8, bbox_to_anchor=(1, 1.22), frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def _name(stream: int, spans: list[Span]) -> str:
    kinds = {span.kind for span in spans if span.stream == stream}
    return "copies in" if kinds == {"copy in"} else f"lane (stream {stream})"


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--milliseconds", type=float, default=8.0)
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    options = summary["options"]
    spans = read_spans(args.run / "trace.json")
    length_us = args.milliseconds * 1000
    title = (
        f"{summary['experiment']}, batch {options['inputs']['batch_size']}, {options['model']['precision']},"
        f" {summary['environment']['gpu_name']}"
    )
    draw(spans, busiest_window(spans, length_us), length_us, title, args.target)


if __name__ == "__main__":
    main()
