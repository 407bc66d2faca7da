"""Figures of one run: response time over time, batch sizes, devices, and what its lanes had under way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from headrace.clock import NS_PER_S
from headrace.report.figures import Figure
from headrace.report.measured import CellNumbers, Detail
from headrace.report.reduce import COLUMNS, Envelope, Floats
from headrace.report.spans import Timeline
from headrace.report.svg import Chart, Label, Scale, Tick, number_ticks, padded_log, ticks_within, time_ticks
from headrace.report.words import digits, duration

KIND_STYLES = {"copy in": "g1", "compute": "g3", "copy out": "g4"}
MOST_SIZES = 24  # bars of a histogram
MARGIN = 0.15  # of the measured time: so much of the samples before and after it is shown
TIMELINE_ROW = 22.0


def run_figures(numbers: CellNumbers) -> list[Figure]:
    """Return a cell's figures over time, of its run with the longest response."""
    detail = numbers.detail
    if detail is None:
        return []
    figures = [latency_over_time(detail), batch_histogram(numbers), devices_over_time(numbers, detail)]
    figures.append(timeline_figure(detail.timeline, detail.run_name) if detail.timeline else None)
    return [figure for figure in figures if figure]


def latency_over_time(detail: Detail) -> Figure:
    """Return response and service time within the run. Every extreme is kept."""
    chart = Chart("response and service time within the run", left=60.0, right=70.0)
    envelopes = (("response", detail.response), ("service", detail.service))
    x = chart.x(0, max(detail.window_s, 1e-9))
    values = [float(value) for _, each in envelopes for value in (each.low.min(), each.high.max())]
    y = chart.y(*padded_log([max(value, 1e-9) for value in values]), log=True)
    chart.y_axis(y, ticks_within(y, time_ticks))
    chart.x_axis(x, ticks_within(x, number_ticks), "seconds since the first measured request was due")
    labels = []
    for at, (name, each) in enumerate(envelopes):
        _draw_envelope(chart, each, x, y, at)
        labels.append(Label(y(float(each.middle[-1])), name, f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)
    reduced = (
        f" {detail.response.count:,} requests in columns of {duration(detail.response.column_s)}: from the"
        " shortest to the longest in each, which are all kept, and a line through the medians; gaps are columns without"
        " a request."
        if detail.response.is_reduced
        else " A dot for each request."
    )
    when = "Placed by when they were due." if detail.by_schedule else "Placed by when they were answered."
    return Figure(title="Response and service time over the run", svg=chart.done(), caption=when + reduced)


def _draw_envelope(chart: Chart, values: Envelope, x: Scale, y: Scale, at: int) -> None:
    places = [x(float(each)) for each in values.at_s]
    if not values.is_reduced:
        chart.dots([(px, y(float(value))) for px, value in zip(places, values.middle, strict=True)], f"s{at}")
        return
    width = x(values.column_s) - x(0.0)
    ends = zip(places, values.low, values.high, strict=True)
    # A column whose values are all alike is still drawn a pixel high.
    bars = [(px, y(float(low)) + 0.5, y(float(high)) - 0.5) for px, low, high in ends]
    chart.bars(bars, width, f"s{at} band")
    for part in np.split(np.arange(len(places)), np.flatnonzero(np.diff(values.at_s) > 1.5 * values.column_s) + 1):
        chart.line([(places[each], y(float(values.middle[each]))) for each in part], f"s{at} thin")


def batch_histogram(numbers: CellNumbers) -> Figure | None:
    """Return how many batches of each size ran, over all runs of the cell; None for fewer than two sizes."""
    batches = numbers.batches
    if len(batches) < 2:
        return None
    bins = _binned(batches)
    chart = Chart("batches by their number of rows", left=60.0, height=220.0)
    y = chart.y(0, max(bins.values()) * 1.08)
    chart.y_axis(y, ticks_within(y, number_ticks))
    x = chart.x(0, len(bins))
    chart.x_axis(x, [Tick(at + 0.5, label) for at, label in enumerate(bins)], "rows of a batch")
    width = min(36.0, 0.8 * (x(1) - x(0)))
    for at, (label, many) in enumerate(bins.items()):
        tip = f"{label} rows: {digits(many)} batches"
        chart.box(x(at + 0.5) - width / 2, y(many), width, chart.inner_bottom - y(many), "f0", tip=tip)
    rows = sum(size * many for size, many in batches.items())
    mean = rows / sum(batches.values())
    return Figure(
        title="Batches that ran, by rows",
        svg=chart.done(),
        caption=f"{sum(batches.values()):,.0f} batches of all runs, {digits(mean)} rows on average.",
    )


def _binned(batches: dict[int, float]) -> dict[str, float]:
    """Return bars by label: each size by itself if they are few, else ranges of equal width."""
    if len(batches) <= MOST_SIZES:
        return {str(size): many for size, many in batches.items()}
    width = math.ceil(max(batches) / MOST_SIZES)
    bins: dict[str, float] = {}
    for low in range(1, max(batches) + 1, width):
        label = f"{low}\N{EN DASH}{low + width - 1}" if width > 1 else str(low)
        bins[label] = sum(many for size, many in batches.items() if low <= size < low + width)
    return bins


def devices_over_time(numbers: CellNumbers, detail: Detail) -> Figure | None:
    """Return what GPU and CPU did around the measured time; None where nothing was polled."""
    telemetry = detail.telemetry
    if telemetry is None:
        return None
    seconds_in = (telemetry.at_ns - detail.zero_ns) / NS_PER_S
    margin = max(MARGIN * detail.window_s, 0.3)
    near = (seconds_in >= -margin) & (seconds_in <= detail.window_s + margin)
    environment = numbers.runs[0].run.summary.environment
    lines: list[tuple[str, Floats]] = [("GPU", telemetry.gpu_pct), ("CPU", telemetry.cpu_pct)]
    if environment.gpu_power_limit_w:
        lines.append(("power", 100 * telemetry.power_w / environment.gpu_power_limit_w))
    lines = [(name, values) for name, values in lines if not np.isnan(values[near]).all()]
    if near.sum() < 2 or not lines:
        return None
    chart = Chart("device activity within the run", right=56.0, height=240.0)
    x = chart.x(float(seconds_in[near].min()), max(float(seconds_in[near].max()), detail.window_s))
    y = chart.y(0, 105)
    chart.box(x(0.0), chart.top, x(detail.window_s) - x(0.0), chart.inner_bottom - chart.top, "window")
    chart.y_axis(y, [Tick(at, f"{at} %") for at in (0, 25, 50, 75, 100)])
    chart.x_axis(x, ticks_within(x, number_ticks), "seconds since the first measured request was due")
    labels = [_draw_samples(chart, name, (x, y), seconds_in[near], values[near]) for name, values in lines]
    chart.end_labels(labels, chart.inner_right + 8)
    return Figure(
        title="GPU and CPU activity over the run, %" if lines[0][0] == "GPU" else "CPU activity over the run, %",
        svg=chart.done(),
        caption="Shaded: the measured time."
        + (" GPU: share of time with any kernel running (NVML)." if lines[0][0] == "GPU" else "")
        + " CPU: of all logical CPUs of the machine."
        + (f" Power: of the limit of {environment.gpu_power_limit_w:g} W." if len(lines) > 2 else ""),
    )


def _draw_samples(chart: Chart, name: str, scales: tuple[Scale, Scale], at_s: Floats, values: Floats) -> Label:
    """Draw a line of polled samples, as columns from least to most where there are more than can be seen."""
    style = {"GPU": 0, "CPU": 1, "power": 2}[name]
    known = ~np.isnan(values)
    at_s, values = at_s[known], values[known]
    x, y = scales
    if len(values) > 2 * COLUMNS:  # least and most of each column, in turn
        parts = np.array_split(np.arange(len(values)), COLUMNS)
        kept = np.unique(
            [each for part in parts for each in (part[values[part].argmin()], part[values[part].argmax()])]
        )
        at_s, values = at_s[kept], values[kept]
    chart.line([(x(float(at)), y(float(value))) for at, value in zip(at_s, values, strict=True)], f"s{style}")
    return Label(y(float(values[-1])), name, f"t{style}")


def timeline_figure(timeline: Timeline, run_name: str) -> Figure:
    """Return lanes as rows, with what each did when."""
    names = list(timeline.rows.values())
    left = 16 + 6.7 * max((len(name) for name in names), default=0)
    chart = Chart("what ran when", height=TIMELINE_ROW * len(names) + 60, left=left, top=8.0, bottom=44.0)
    x = chart.x(0, timeline.length_us / 1000)
    chart.x_axis(x, ticks_within(x, number_ticks), "milliseconds", grid=True)
    place = {stream: at for at, stream in enumerate(timeline.rows)}
    for stream, name in timeline.rows.items():
        chart.text(chart.left - 6, chart.top + TIMELINE_ROW * (place[stream] + 0.5) + 4, name, "end")
    for kind in timeline.kinds:
        for stream, at in place.items():
            middle = chart.top + TIMELINE_ROW * (at + 0.5)
            bars = _clipped(timeline, kind, stream, x)
            if bars:
                where = "".join(f"M{begin:.1f} {middle:.1f}H{end:.1f}" for begin, end in bars)
                chart.parts.append(f'<path class="lane {KIND_STYLES[kind]}" d="{where}"/>')
    several = " Batches that a lane has at once lie in rows of their own." if "" in names else ""
    return Figure(
        title="What ran when: lanes as rows",
        svg=chart.done(),
        caption=f"Run {run_name}; source: {timeline.source}.{several}",
        key=tuple((KIND_STYLES[kind], kind) for kind in timeline.kinds),
    )


def _clipped(timeline: Timeline, kind: str, stream: int, x: Scale) -> Sequence[tuple[float, float]]:
    bars = []
    for span in timeline.spans:
        if span.kind == kind and span.stream == stream:
            begin = max(0.0, span.begin_us - timeline.begin_us)
            end = min(timeline.length_us, span.end_us - timeline.begin_us)
            if end > begin:
                first = x(begin / 1000)
                bars.append((first, max(first + 0.3, x(end / 1000))))
    return bars
