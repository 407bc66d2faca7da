"""Which figures a report has: those that compare cells, and those of one run over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.report.measured import CellNumbers
from headrace.report.read import BURST
from headrace.report.reduce import STAGES, Tail
from headrace.report.svg import (

    Chart,
    Label,
    Scale,
    Tick,
    label_room,
    number_ticks,
    padded_log,
    shorten,
    ticks_within,
    time_ticks,
)
from headrace.report.words import count, digits, duration

MOST_LINES = 7  # colours that the colour-blind tell apart, on light and on dark ground
MOST_TAIL_FIGURES = 8
LABEL_ROOM = 210.0
ROW = 19.0
SHARES = {0.5: "p50", 0.1: "p90", 0.01: "p99", 0.001: "p99.9", 1e-4: "p99.99", 1e-5: "p99.999"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its heading, and a sentence on how to read it."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False
    key: tuple[tuple[str, str], ...] = ()  # style and name of each colour, where the chart does not name them itself


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name, and its cells in order of the axis."""

    name: str
    cells: tuple[CellNumbers, ...]


def comparisons(cells: Sequence[CellNumbers]) -> list[Figure]:
    """Return the figures that set cells side by side. Only what counts is drawn."""
    good = [cell for cell in cells if cell.good and cell.response and cell.throughput]
    if not good:
        return []
    figures = [
        *_throughput_figures(good),
        *_latency_figures(good, "batch size", lambda cell: float(cell.cell.batch_size), is_open=False),
        *_latency_figures(good, "offered load, requests/s", lambda cell: cell.cell.load.rate or 0.0, is_open=True),
        every_cell(good),
        stage_bars(good),
        *_tail_figures(good),
    ]
    warm = warmup_bars(good)
    return [figure for figure in (*figures, warm) if figure]


def names_of(cells: Sequence[CellNumbers]) -> list[str]:
    """Return what tells the cells' series apart: words that all of them share are left out."""
    shared = set.intersection(*(set(cell.cell.series) for cell in cells)) if cells else set()
    return [" · ".join(word for word in cell.cell.series if word not in shared) for cell in cells]


def shared_words(cells: Sequence[CellNumbers]) -> str:
    """Return the words that all cells' series share, in order."""
    shared = set.intersection(*(set(cell.cell.series) for cell in cells))
    return " · ".join(word for word in cells[0].cell.series if word in shared)


def full_names(cells: Sequence[CellNumbers]) -> list[str]:
    """Return what tells the cells apart, batch size and load included where they differ."""
    batches = {cell.cell.batch_size for cell in cells}
    loads = {(cell.cell.load.kind, cell.cell.load.rate, cell.cell.load.concurrency) for cell in cells}
    names = []
    for cell, name in zip(cells, names_of(cells), strict=True):
        words = [name] if name else []
        words += [f"batch {cell.cell.batch_size}"] if len(batches) > 1 else []
        words += [cell.cell.load_words] if len(loads) > 1 else []
        names.append(" · ".join(words) or cell.cell.label)
    return names


def series_of(cells: Sequence[CellNumbers], axis: Callable[[CellNumbers], float]) -> tuple[list[Series], int]:
    """Return the lines to draw, fastest first, and how many there was no colour for. A line has 2 points at least."""
    grouped: dict[tuple[object, ...], dict[float, CellNumbers]] = {}
    for cell in cells:
        load = cell.cell.load
        key = (cell.cell.series, load.concurrency, None if axis(cell) == cell.cell.batch_size else cell.cell.batch_size)
        grouped.setdefault(key, {}).setdefault(axis(cell), cell)
    lines = [tuple(group[at] for at in sorted(group)) for group in grouped.values() if len(group) > 1]
    lines.sort(key=lambda line: (-len(line), -max(cell.throughput or 0.0 for cell in line)))
    chosen = lines[:MOST_LINES]
    names = _line_names([line[0] for line in chosen], with_batch=axis(cells[0]) != cells[0].cell.batch_size)
    return [Series(name, line) for name, line in zip(names, chosen, strict=True)], len(lines) - len(chosen)


def _line_names(first: Sequence[CellNumbers], *, with_batch: bool) -> list[str]:
    names = names_of(first)
    if len(first) == 1:
        names = [""]
    in_flight = {cell.cell.load.concurrency for cell in first}
    for at, cell in enumerate(first):
        words = [names[at]] if names[at] else []
        if len(in_flight) > 1:
            words.append(f"{cell.cell.load.concurrency} in flight")
        if with_batch:
            words.append(f"batch {cell.cell.batch_size}")
        names[at] = " · ".join(words)
    return names


def _throughput_figures(cells: Sequence[CellNumbers]) -> list[Figure]:
    shown = [cell for cell in cells if not cell.cell.load.is_open]
    lines, left_out = series_of(shown, lambda cell: float(cell.cell.batch_size)) if shown else ([], 0)
    if not lines:
        return []
    chart = Chart("throughput against batch size", right=label_room([each.name for each in lines], LABEL_ROOM))
    highest = max(max(cell.throughputs) for each in lines for cell in each.cells)
    x = _batch_axis(chart, lines)
    y = chart.y(0, highest * 1.06)
    chart.y_axis(y, ticks_within(y, number_ticks))
    labels = []
    for at, each in enumerate(lines):
        points = [(x(cell.cell.batch_size), y(cell.throughput or 0.0)) for cell in each.cells]
        chart.line(points, f"s{at}")
        for (px, py), cell in zip(points, each.cells, strict=True):
            chart.segment(px, y(min(cell.throughputs)), px, y(max(cell.throughputs)), f"line s{at}")
            tip = f"{cell.cell.label}, batch {cell.cell.batch_size}: {digits(cell.throughput)} samples/s"
            chart.dot(px, py, f"f{at}", tip)
        labels.append(Label(points[-1][1], each.name, f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)
    return [
        Figure(
            title="Throughput against batch size, samples/s",
            svg=chart.done(),
            caption=_said(
                _about([line.cells[0] for line in lines]),
                "Dots: mean of the runs; upright lines: least to most.",
                _left_out(left_out),
            ),
        )
    ]


def _latency_figures(
    cells: Sequence[CellNumbers], axis_name: str, axis: Callable[[CellNumbers], float], *, is_open: bool
) -> list[Figure]:
    shown = [cell for cell in cells if cell.cell.load.is_open == is_open and axis(cell) > 0]
    lines, left_out = series_of(shown, axis) if shown else ([], 0)
    if not lines:
        return []
    against = "offered load" if is_open else "batch size"
    kinds: tuple[tuple[str, Callable[[CellNumbers], Tail | None]], ...] = (
        ("Response time", lambda cell: cell.response),
        ("Service time", lambda cell: cell.service),
    )
    figures = []
    for name, read in kinds:
        chart = Chart(f"{name} against {against}", right=label_room([each.name for each in lines], LABEL_ROOM))
        x = _axis_of(chart, lines, axis, axis_name) if is_open else _batch_axis(chart, lines)
        _draw_percentiles(chart, lines, x, axis, read)
        figures.append(
            Figure(
                title=f"{name} against {against}: p50 and p99",
                svg=chart.done(),
                caption=_said(
                    _about([line.cells[0] for line in lines]),
                    "Solid: p50; dashed: p99, where there are 100 values.",
                    _meaning(name, shown),
                    _left_out(left_out),
                ),
            )
        )
    return figures


def _draw_percentiles(
    chart: Chart,
    lines: Sequence[Series],
    x: Scale,
    axis: Callable[[CellNumbers], float],
    read: Callable[[CellNumbers], Tail | None],
) -> None:
    values = {
        (at, name): [
            (axis(cell), tail.percentiles[name])
            for cell in each.cells
            if (tail := read(cell)) is not None and name in tail.percentiles
        ]
        for at, each in enumerate(lines)
        for name in ("p50", "p99")
    }
    y = chart.y(*padded_log([value for points in values.values() for _, value in points]), log=True)
    chart.y_axis(y, ticks_within(y, time_ticks))
    labels = []
    for (at, name), pairs in values.items():
        points = [(x(place), y(value)) for place, value in pairs]
        if not points:
            continue
        chart.line(points, f"s{at}" + (" dashed" if name == "p99" else ""), f"{lines[at].name} {name}")
        if name == "p50":
            for (px, py), (_, value) in zip(points, pairs, strict=True):
                chart.dot(px, py, f"f{at}", f"{lines[at].name} p50: {duration(value)}")
            labels.append(Label(points[-1][1], lines[at].name, f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)


def _batch_axis(chart: Chart, lines: Sequence[Series]) -> Scale:
    sizes = sorted({cell.cell.batch_size for each in lines for cell in each.cells})
    x = Scale(sizes[0] / 1.15, sizes[-1] * 1.1, chart.left, chart.inner_right, log=True)
    chart.x_axis(x, [Tick(size, str(size)) for size in sizes], "batch size (rows of a request)")
    return x


def _axis_of(chart: Chart, lines: Sequence[Series], axis: Callable[[CellNumbers], float], name: str) -> Scale:
    values = [axis(cell) for each in lines for cell in each.cells]
    x = chart.x(0, max(values) * 1.04)
    chart.x_axis(x, ticks_within(x, number_ticks), name)
    return x


def every_cell(cells: Sequence[CellNumbers]) -> Figure | None:
    """Return a row for each cell: throughput, fastest first within a batch size."""
    if len(cells) < 2:
        return None
    ordered = sorted(cells, key=lambda cell: (cell.cell.batch_size, -(cell.throughput or 0.0)))
    names = full_names(ordered)
    chart = _row_chart("throughput of every cell", len(ordered), names, right=64.0)
    x = chart.x(0, max(max(cell.throughputs) for cell in ordered) * 1.02)
    chart.x_axis(x, ticks_within(x, number_ticks), "samples/s", grid=True)
    for at, (cell, name) in enumerate(zip(ordered, names, strict=True)):
        middle = chart.top + ROW * (at + 0.5)
        _row_name(chart, name, middle)
        value = cell.throughput or 0.0
        tip = f"{cell.cell.label}, batch {cell.cell.batch_size}: {digits(value)} samples/s"
        chart.box(chart.left, middle - 5, x(value) - chart.left, 10, "f0 soft", tip=tip)
        chart.segment(x(min(cell.throughputs)), middle, x(max(cell.throughputs)), middle, "whisker")
        chart.text(x(max(cell.throughputs)) + 6, middle + 4, digits(value), "value")
    return Figure(
        title="Throughput of every cell, samples/s",
        svg=chart.done(),
        caption=_said(_about(ordered), "Bars: mean of the runs; lines on them: least to most."),
    )


def stage_bars(cells: Sequence[CellNumbers]) -> Figure | None:
    """Return where the mean request's time went: shares, with the mean time itself beside them."""
    shown = [cell for cell in cells if cell.stages_s]
    if not shown:
        return None
    names = full_names(shown)
    chart = _row_chart("share of a request's time by stage", len(shown), names, right=66.0)
    x = chart.x(0, 100)
    chart.x_axis(x, ticks_within(x, number_ticks), "share of the mean time, %", grid=True)
    for at, (cell, name) in enumerate(zip(shown, names, strict=True)):
        middle = chart.top + ROW * (at + 0.5)
        _row_name(chart, name, middle)
        stages = cell.stages_s or ()
        first = 1 if cell.cell.load.kind == BURST else 0
        whole, passed = sum(stages[first:]), 0.0
        for stage in range(first, len(stages)):
            share = 100 * stages[stage] / whole if whole else 0.0
            tip = f"{name}: {STAGES[stage][0]} {duration(stages[stage])}, {share:.1f} %"
            chart.box(x(passed), middle - 7, max(0.0, x(passed + share) - x(passed)), 14, f"g{stage}", tip=tip)
            passed += share
        chart.text(x(100) + 6, middle + 4, duration(whole), "value")
    bursts = any(cell.cell.load.kind == BURST for cell in shown)
    used = range(1 if all(cell.cell.load.kind == BURST for cell in shown) else 0, len(STAGES))
    return Figure(
        title="Where a request's time goes: mean of each stage",
        svg=chart.done(),
        caption=_said(
            _about(shown),
            "At the right the mean time itself.",
            "Of a burst the service time is shown: its issue delay is the line in which it waits to be sent, and stands"
            " in the table."
            if bursts
            else "",
            "Stamps are the host's: on a GPU, 'compute' may end when the work is launched, and the rest of it is then"
            " within 'copy out'.",
        ),
        key=tuple((f"g{stage}", STAGES[stage][0]) for stage in used),
    )


def warmup_bars(cells: Sequence[CellNumbers]) -> Figure | None:
    """Return the parts of the warm-up latency, of each cell's run with the median one."""
    runs = [(cell, cell.warmup_run) for cell in cells]
    shown = [(cell, run) for cell, run in runs if run is not None and run.warmup_parts_s]
    if not shown:
        return None
    names = full_names([cell for cell, _ in shown])
    parts = list(dict.fromkeys(part for _, run in shown for part in run.warmup_parts_s))
    chart = _row_chart("warm-up latency in parts", len(shown), names, right=60.0)
    x = chart.x(0, max(sum(run.warmup_parts_s.values()) for _, run in shown) * 1.01)
    chart.x_axis(x, ticks_within(x, number_ticks), "seconds from the first request to its answer", grid=True)
    for at, (name, (_, run)) in enumerate(zip(names, shown, strict=True)):
        middle, passed = chart.top + ROW * (at + 0.5), 0.0
        _row_name(chart, name, middle)
        for part, took in run.warmup_parts_s.items():
            style = f"p{parts.index(part) % 8}"
            chart.box(x(passed), middle - 7, x(passed + took) - x(passed), 14, style, tip=f"{part}: {duration(took)}")
            passed += took
        chart.text(x(passed) + 6, middle + 4, duration(passed), "value")
    return Figure(
        title="Warm-up latency in parts, s",
        svg=chart.done(),
        caption=_said(_about([cell for cell, _ in shown]), "Of each cell the run with the median latency."),
        key=tuple((f"p{at % 8}", part) for at, part in enumerate(parts)),
    )


def _tail_figures(cells: Sequence[CellNumbers]) -> list[Figure]:
    """Return tails of response and service time: together if they are few, else by batch size."""
    groups: dict[int, list[CellNumbers]] = {}
    if len(cells) <= MOST_LINES:
        groups[0] = list(cells)
    else:
        for cell in cells:
            groups.setdefault(cell.cell.batch_size, []).append(cell)
    figures = []
    for batch, group in sorted(groups.items()):
        shown = sorted(group, key=lambda cell: -(cell.throughput or 0.0))[:MOST_LINES]
        where = f", batch size {batch}" if batch else ""
        left_out = len(group) - len(shown)
        figures += [
            _tail_figure(f"Response time{where}", shown, lambda cell: cell.response, left_out),
            _tail_figure(f"Service time{where}", shown, lambda cell: cell.service, left_out),
        ]
    return figures[: 2 * MOST_TAIL_FIGURES]


def _tail_figure(
    name: str, cells: Sequence[CellNumbers], read: Callable[[CellNumbers], Tail | None], left_out: int
) -> Figure:
    names = full_names(cells) if len(cells) > 1 else [""]
    chart = Chart(f"{name}: share of requests that took longer", left=60.0, right=label_room(names, LABEL_ROOM))
    tails = [(at, tail) for at, cell in enumerate(cells) if (tail := read(cell)) is not None]
    x = chart.x(*padded_log([float(value) for _, tail in tails for value in tail.at_s[[0, -1]]], 1.1, 1.1), log=True)
    y = Scale(
        1 / max(max(tail.count for _, tail in tails), 20), 1.0, chart.top, chart.inner_bottom, log=True
    )  # rare ones on top
    chart.x_axis(x, ticks_within(x, time_ticks), f"{name.partition(',')[0].lower()} (logarithmic)", grid=True)
    chart.y_axis(y, [Tick(share, label) for share, label in SHARES.items() if share >= y.low])
    labels = []
    for at, tail in tails:
        points = [(x(float(value)), y(float(share))) for value, share in zip(tail.at_s, tail.share_above, strict=True)]
        tip = ", ".join(f"{key} {duration(value)}" for key, value in tail.percentiles.items())
        chart.line(points, f"s{at}", f"{names[at]}: {tip}")
        labels.append(Label(points[-1][1], names[at], f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)
    return Figure(
        title=f"{name}: how much of it is how slow",
        svg=chart.done(),
        caption=_said(
            _about(cells),
            "Upwards: the percentile, each line a tenth rarer; a line ends at the slowest request of all runs.",
            _meaning(name, cells),
            _left_out(left_out),
        ),
    )


def _meaning(name: str, cells: Sequence[CellNumbers]) -> str:
    if name.startswith("Response") and all(cell.cell.load.kind == BURST for cell in cells):
        return "All requests of a burst are planned at once, so this is mostly waiting in line."
    return ""


def _row_chart(title: str, rows: int, names: Sequence[str], right: float) -> Chart:
    left = label_room(names, LABEL_ROOM) + 4
    return Chart(title, height=ROW * rows + 52, left=left, right=right, top=8.0, bottom=44.0)


def _row_name(chart: Chart, name: str, middle: float) -> None:
    chart.text(chart.left - 6, middle + 4, shorten(name, chart.left - 6), "end")


def _about(cells: Sequence[CellNumbers]) -> str:
    shared = shared_words(cells)
    return f"{shared}." if shared else ""


def _left_out(number: int) -> str:
    return f"The fastest {MOST_LINES}; {count(number, 'more line')} would not be told apart and stand in the table." if (
        number > 0
    ) else ""


def _said(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


