"""Which figures a report has: those that compare cells, and those of one run over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.report.cells import LOAD_KIND, Trait
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
LETTERS_AT_END = 20
LABEL_ROOM = 160.0
MAJORITY = 0.5  # a word that more than this share of the cells has is said once, for all of them
ROW = 33.0
SHARE_DRAWN = 0.9
KINDS: tuple[tuple[str, Callable[[CellNumbers], Tail | None]], ...] = (
    ("Response time", lambda cell: cell.response),
    ("Service time", lambda cell: cell.service),
)
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


@dataclass(frozen=True, slots=True)
class Lines:
    """Series of a plot, fastest first. `left_out` had no colour left."""

    drawn: tuple[Series, ...]
    names: Names
    left_out: int

    @property
    def key(self) -> Key:
        return Key.of([each.name for each in self.drawn])


def comparisons(cells: Sequence[CellNumbers]) -> list[Figure]:
    """Return the figures that set cells side by side. Only what counts is drawn."""
    good = [cell for cell in cells if cell.good and cell.response and cell.throughput]
    if not good:
        return []
    figures: list[Figure | None] = [
        *_throughput_figures(good),
        *(figure for axis in (BATCH, CONCURRENCY, RATE) for figure in _latency_figures(good, axis)),
        *_tail_figures(good),
        every_cell(good),
        stage_bars(good),
        warmup_bars(good),
    ]
    return [figure for figure in figures if figure]


@dataclass(frozen=True, slots=True)
class Names:
    """What tells cells apart, and what is true of all that do not say otherwise."""

    each: tuple[str, ...]
    common: str

    @property
    def sentence(self) -> str:
        if not self.common:
            return ""
        return f"{self.common}{', unless a name says otherwise' if any(self.each) and len(self.each) > 1 else ''}."


def names_of(cells: Sequence[CellNumbers], *, but: tuple[str, ...] = ()) -> Names:
    """Name cells by what is not true of most of them, leaving out the traits that `but` names."""
    traits = [{name: trait for name, trait in cell.cell.traits.items() if name not in but} for cell in cells]
    common: dict[str, Trait] = {}
    for name in dict.fromkeys(name for each in traits for name in each):
        trait, many = Counter(each[name] for each in traits if name in each).most_common(1)[0]
        if many == len(cells) or (many > MAJORITY * len(cells) and name != "design.name"):
            common[name] = trait
    each = [" · ".join(trait.word for name, trait in own.items() if trait != common.get(name)) for own in traits]
    if any(each):
        each = [name or cell.cell.traits["design.name"].word for name, cell in zip(each, cells, strict=True)]
    said = " · ".join(
        trait.word
        for name, trait in common.items()
        if not trait.usual or any(own.get(name, trait) != trait for own in traits)
    )
    return Names(tuple(each), said)


def full_names(cells: Sequence[CellNumbers]) -> Names:
    """Return what tells the cells apart, batch size and load included where they differ."""
    batches = {cell.cell.batch_size for cell in cells}
    loads = {(cell.cell.load.kind, cell.cell.load.rate, cell.cell.load.concurrency) for cell in cells}
    series = names_of(cells, but=(LOAD_KIND,))
    names = []
    for cell, name in zip(cells, series.each, strict=True):
        words = [f"batch {cell.cell.batch_size}"] if len(batches) > 1 else []
        words += [name] if name else []
        words += [cell.cell.load_in_short] if len(loads) > 1 else []
        names.append(" · ".join(words) or cell.cell.label)
    many = Counter(names)
    pairs = zip(names, cells, strict=True)
    told = [f"{name} · {cell.cell.load_words}" if many[name] > 1 else name for name, cell in pairs]
    return Names(tuple(told), series.common)


@dataclass(frozen=True, slots=True)
class Key:
    """How lines are named: at their ends if the names are short, else by numbers that a list explains."""

    at_ends: tuple[str, ...]
    listed: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Key:
        if max(map(len, names)) <= LETTERS_AT_END:
            return cls(tuple(names), ())
        numbers = tuple(str(at + 1) for at in range(len(names)))
        listed = tuple((f"k{at}", f"{at + 1}  {name}") for at, name in enumerate(names))
        return cls(numbers, listed)

    @property
    def room(self) -> float:
        return label_room(self.at_ends, LABEL_ROOM)


@dataclass(frozen=True, slots=True)
class Axis:
    """What latency is drawn against, and for which cells that means something."""

    against: str
    name: str
    of: Callable[[CellNumbers], float]
    fits: Callable[[CellNumbers], bool]


BATCH = Axis(
    "batch size",
    "batch size (rows of a request)",
    lambda cell: float(cell.cell.batch_size),
    lambda cell: not cell.cell.is_open,
)
CONCURRENCY = Axis(
    "requests in flight",
    "requests in flight",
    lambda cell: float(cell.cell.load.concurrency or 0),
    lambda cell: cell.cell.load.concurrency is not None,
)
RATE = Axis(
    "offered load",
    "offered load, requests/s",
    lambda cell: cell.cell.load.rate or 0.0,
    lambda cell: cell.cell.load.rate is not None,
)


def series_of(cells: Sequence[CellNumbers], axis: Axis) -> Lines | None:
    """Return the lines to draw; None if no line has two points. Where cells share a place the fastest is drawn."""
    grouped: dict[tuple[object, ...], dict[float, CellNumbers]] = {}
    for cell in sorted(filter(axis.fits, cells), key=_rate, reverse=True):
        batch, concurrency = cell.cell.batch_size, cell.cell.load.concurrency
        key = (cell.cell.series, None if axis is BATCH else batch, None if axis is CONCURRENCY else concurrency)
        grouped.setdefault(key, {}).setdefault(axis.of(cell), cell)
    lines = [tuple(group[at] for at in sorted(group)) for group in grouped.values() if len(group) > 1]
    if not lines:
        return None
    lines.sort(key=lambda line: (-len(line), -max(map(_rate, line))))
    chosen = sorted(lines[:MOST_LINES], key=lambda line: -max(map(_rate, line)))
    names = _line_names([line[0] for line in chosen], axis)
    drawn = tuple(Series(name, line) for name, line in zip(names.each, chosen, strict=True))
    return Lines(drawn, names, len(lines) - len(chosen))


def _rate(cell: CellNumbers) -> float:
    return cell.throughput or 0.0


def _line_names(first: Sequence[CellNumbers], axis: Axis) -> Names:
    series = names_of(first)
    in_flight = {cell.cell.load.concurrency for cell in first} if axis is not CONCURRENCY else set()
    batches = {cell.cell.batch_size for cell in first} if axis is not BATCH else set()
    names = []
    for cell, name in zip(first, series.each, strict=True):
        words = [name] if name else []
        words += [f"{cell.cell.load.concurrency} in flight"] if len(in_flight) > 1 else []
        words += [f"batch {cell.cell.batch_size}"] if len(batches) > 1 else []
        names.append(" · ".join(words))
    return Names(tuple(names), series.common)


def _throughput_figures(cells: Sequence[CellNumbers]) -> list[Figure]:
    lines = series_of(cells, BATCH)
    if lines is None:
        return []
    chart = Chart("throughput against batch size", right=lines.key.room)
    highest = max(rate for each in lines.drawn for cell in each.cells for rate in cell.throughputs)
    x = _batch_axis(chart, lines)
    y = chart.y(0, highest * 1.06)
    chart.y_axis(y, ticks_within(y, number_ticks))
    labels = []
    for at, (each, end) in enumerate(zip(lines.drawn, lines.key.at_ends, strict=True)):
        points = [(x(cell.cell.batch_size), y(_rate(cell))) for cell in each.cells]
        chart.line(points, f"s{at}")
        for (px, py), cell in zip(points, each.cells, strict=True):
            chart.segment(px, y(min(cell.throughputs)), px, y(max(cell.throughputs)), f"line s{at}")
            tip = f"{cell.cell.label}, batch {cell.cell.batch_size}: {digits(cell.throughput)} samples/s"
            chart.dot(px, py, f"f{at}", tip)
        labels.append(Label(points[-1][1], end, f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)
    several = any(len(cell.throughputs) > 1 for each in lines.drawn for cell in each.cells)
    return [
        Figure(
            title="Throughput against batch size, samples/s",
            svg=chart.done(),
            caption=_said(
                lines.names.sentence,
                "Dots: mean of the runs; upright lines: least to most." if several else "",
                _left_out(lines.left_out),
            ),
            key=lines.key.listed,
        )
    ]


def _latency_figures(cells: Sequence[CellNumbers], axis: Axis) -> list[Figure]:
    lines = series_of(cells, axis)
    if lines is None:
        return []
    figures = []
    for name, read in KINDS:
        chart = Chart(f"{name} against {axis.against}", right=max(lines.key.room, 40.0))
        x = _batch_axis(chart, lines) if axis is BATCH else _axis_of(chart, lines, axis)
        _draw_percentiles(chart, lines, x, axis, read)
        figures.append(
            Figure(
                title=f"{name} against {axis.against}: p50, p99",
                svg=chart.done(),
                caption=_said(
                    lines.names.sentence,
                    "Solid: p50; dashed: p99, where there are 100 values.",
                    _meaning(name, [cell for each in lines.drawn for cell in each.cells]),
                    _left_out(lines.left_out),
                ),
                key=lines.key.listed,
            )
        )
    return figures


def _draw_percentiles(
    chart: Chart,
    lines: Lines,
    x: Scale,
    axis: Axis,
    read: Callable[[CellNumbers], Tail | None],
) -> None:
    values = {
        (at, name): [
            (axis.of(cell), tail.percentiles[name])
            for cell in each.cells
            if (tail := read(cell)) is not None and name in tail.percentiles
        ]
        for at, each in enumerate(lines.drawn)
        for name in ("p50", "p99")
    }
    y = chart.y(*padded_log([value for points in values.values() for _, value in points]), log=True)
    chart.y_axis(y, ticks_within(y, time_ticks))
    labels = []
    for (at, name), pairs in values.items():
        points = [(x(place), y(value)) for place, value in pairs]
        if not points:
            continue
        chart.line(points, f"s{at}" + (" dashed" if name == "p99" else ""), f"{lines.drawn[at].name} {name}")
        if name == "p50":
            for (px, py), (_, value) in zip(points, pairs, strict=True):
                chart.dot(px, py, f"f{at}", f"{lines.drawn[at].name} p50: {duration(value)}")
        if name == "p50" or len(lines.drawn) == 1:
            labels.append(Label(points[-1][1], lines.key.at_ends[at] or name, f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)


def _batch_axis(chart: Chart, lines: Lines) -> Scale:
    sizes = sorted({cell.cell.batch_size for each in lines.drawn for cell in each.cells})
    x = Scale(sizes[0] / 1.15, sizes[-1] * 1.1, chart.left, chart.inner_right, log=True)
    chart.x_axis(x, [Tick(size, str(size)) for size in sizes], BATCH.name)
    return x


def _axis_of(chart: Chart, lines: Lines, axis: Axis) -> Scale:
    x = chart.x(0, max(axis.of(cell) for each in lines.drawn for cell in each.cells) * 1.04)
    chart.x_axis(x, ticks_within(x, number_ticks), axis.name)
    return x


def every_cell(cells: Sequence[CellNumbers]) -> Figure | None:
    """Return a row for each cell: throughput, fastest first within a batch size."""
    if len(cells) < 2:
        return None
    ordered = sorted(cells, key=lambda cell: (cell.cell.batch_size, -_rate(cell)))
    names = full_names(ordered)
    chart = _row_chart("throughput of every cell", len(ordered), right=64.0)
    x = chart.x(0, max(rate for cell in ordered for rate in cell.throughputs) * 1.02)
    chart.x_axis(x, ticks_within(x, number_ticks), "samples/s", grid=True)
    for at, (cell, name) in enumerate(zip(ordered, names.each, strict=True)):
        middle = _row(chart, at, name)
        value = cell.throughput or 0.0
        tip = f"{cell.cell.label}, batch {cell.cell.batch_size}: {digits(value)} samples/s"
        chart.box(chart.left, middle - 6, x(value) - chart.left, 12, "f0 soft", tip=tip)
        chart.segment(x(min(cell.throughputs)), middle, x(max(cell.throughputs)), middle, "whisker")
        chart.text(x(max(cell.throughputs)) + 6, middle + 4, digits(value), "value")
    return Figure(
        title="Throughput of every cell, samples/s",
        svg=chart.done(),
        caption=_said(names.sentence, "Bars: mean of the runs; lines on them: least to most."),
    )


def stage_bars(cells: Sequence[CellNumbers]) -> Figure | None:
    """Return where the mean request's time went: shares, with the mean time itself beside them."""
    shown = [cell for cell in cells if cell.stages_s]
    if not shown:
        return None
    names = full_names(shown)
    chart = _row_chart("share of a request's time by stage", len(shown), right=66.0)
    x = chart.x(0, 100)
    chart.x_axis(x, ticks_within(x, number_ticks), "share of the mean time, %", grid=True)
    for at, (cell, name) in enumerate(zip(shown, names.each, strict=True)):
        middle = _row(chart, at, name)
        stages = cell.stages_s or ()
        first = 1 if cell.cell.load.kind == BURST else 0
        whole, passed = sum(stages[first:]), 0.0
        for stage in range(first, len(stages)):
            share = 100 * stages[stage] / whole if whole else 0.0
            tip = f"{name}: {STAGES[stage][0]} {duration(stages[stage])}, {share:.1f} %"
            chart.box(x(passed), middle - 6, max(0.0, x(passed + share) - x(passed)), 12, f"g{stage}", tip=tip)
            passed += share
        chart.text(x(100) + 6, middle + 4, duration(whole), "value")
    bursts = any(cell.cell.load.kind == BURST for cell in shown)
    used = range(1 if all(cell.cell.load.kind == BURST for cell in shown) else 0, len(STAGES))
    return Figure(
        title="Where a request's time goes: mean of each stage",
        svg=chart.done(),
        caption=_said(
            names.sentence,
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
    chart = _row_chart("warm-up latency in parts", len(shown), right=60.0)
    x = chart.x(0, max(sum(run.warmup_parts_s.values()) for _, run in shown) * 1.01)
    chart.x_axis(x, ticks_within(x, number_ticks), "seconds from the first request to its answer", grid=True)
    for at, (name, (_, run)) in enumerate(zip(names.each, shown, strict=True)):
        middle, passed = _row(chart, at, name), 0.0
        for part, took in run.warmup_parts_s.items():
            style = f"p{parts.index(part) % 8}"
            chart.box(x(passed), middle - 6, x(passed + took) - x(passed), 12, style, tip=f"{part}: {duration(took)}")
            passed += took
        chart.text(x(passed) + 6, middle + 4, duration(passed), "value")
    return Figure(
        title="Warm-up latency in parts, s",
        svg=chart.done(),
        caption=_said(names.sentence, "Of each cell the run with the median latency."),
        key=tuple((f"p{at % 8}", part) for at, part in enumerate(parts)),
    )


def _tail_figures(cells: Sequence[CellNumbers]) -> list[Figure]:
    """Return tails of response and service time: together if they are few, else by batch size.

    Of bursts by batch size only the service time: their response times are lines in wait, all of one shape.
    """
    groups: dict[int, list[CellNumbers]] = {}
    if len(cells) <= MOST_LINES:
        groups[0] = list(cells)
    else:
        for cell in cells:
            groups.setdefault(cell.cell.batch_size, []).append(cell)
    figures = []
    for batch, group in sorted(groups.items()):
        shown = sorted(group, key=_rate, reverse=True)[:MOST_LINES]
        where = f", batch size {batch}" if batch else ""
        kinds = KINDS[1:] if batch and _all_bursts(shown) else KINDS
        left_out = len(group) - len(shown)
        figures += [_tail_figure(f"{name} by percentile{where}", shown, read, left_out) for name, read in kinds]
    return figures


def _tail_figure(
    name: str, cells: Sequence[CellNumbers], read: Callable[[CellNumbers], Tail | None], left_out: int
) -> Figure:
    names = full_names(cells)
    key = Key.of(names.each if len(cells) > 1 else [""])
    chart = Chart(name, left=60.0, right=key.room)
    tails = [(at, tail) for at, cell in enumerate(cells) if (tail := read(cell)) is not None]
    slow = {at: tail.share_above <= SHARE_DRAWN for at, tail in tails}
    ends = [float(value) for at, tail in tails if slow[at].any() for value in tail.at_s[slow[at]][[0, -1]]]
    x = chart.x(*padded_log(ends or [1e-3], 1.1, 1.1), log=True)
    rarest = 1 / max(20, *(tail.count for _, tail in tails))
    y = Scale(rarest, SHARE_DRAWN, chart.top, chart.inner_bottom, log=True)  # rare ones on top
    chart.x_axis(x, ticks_within(x, time_ticks), f"{name.partition(' by')[0].lower()} (logarithmic)", grid=True)
    chart.y_axis(y, [Tick(share, label) for share, label in SHARES.items() if share >= y.low])
    labels = []
    for at, tail in tails:
        pairs = zip(tail.at_s[slow[at]], tail.share_above[slow[at]], strict=True)
        points = [(x(float(value)), y(float(share))) for value, share in pairs]
        if not points:
            continue
        tip = ", ".join(f"{percentile} {duration(value)}" for percentile, value in tail.percentiles.items())
        chart.line(points, f"s{at}", f"{names.each[at]}: {tip}")
        labels.append(Label(points[-1][1], key.at_ends[at], f"t{at}"))
    chart.end_labels(labels, chart.inner_right + 8)
    return Figure(
        title=name,
        svg=chart.done(),
        caption=_said(
            names.sentence,
            "From p10 to the slowest request of all runs, at which each line ends.",
            _meaning(name, cells),
            _left_out(left_out),
        ),
        key=key.listed,
    )


def _all_bursts(cells: Sequence[CellNumbers]) -> bool:
    return all(cell.cell.load.kind == BURST for cell in cells)


def _meaning(name: str, cells: Sequence[CellNumbers]) -> str:
    if name.startswith("Response") and _all_bursts(cells):
        return "All requests of a burst are planned at once, so this is mostly waiting in line."
    return ""


def _row_chart(title: str, rows: int, right: float) -> Chart:
    return Chart(title, height=ROW * rows + 52, left=10.0, right=right, top=4.0, bottom=44.0)


def _row(chart: Chart, at: int, name: str) -> float:
    """Write a row's name above its bar and return the middle of the bar."""
    top = chart.top + ROW * at
    chart.text(chart.left, top + 12, shorten(name, chart.width - chart.left))
    return top + 23


def _left_out(number: int) -> str:
    return (
        f"The fastest {MOST_LINES}; {count(number, 'more line')} would not be told apart and stand in the table."
        if (number > 0)
        else ""
    )


def _said(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
