"""A report before it is written down: machines, cells, numbers; and the tables that both forms of it show."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.bench.summary import RunSummary
from headrace.errors import OutputError
from headrace.report.cells import Machine, machines
from headrace.report.measured import CellNumbers, RunNumbers, compute_cell, mean
from headrace.report.read import Run, Unreadable, find_folders, read_run
from headrace.report.reduce import Tail
from headrace.report.words import NOTHING, digits, duration, percent
from headrace.study.finished import revisions

Step = Callable[[int, int], None]  # cells done, of how many
HEADINGS = (
    "Experiment",
    "Batch size",
    "Throughput, samples/s",
    "Runs",
    "Least to most",
    "Load",
    "Goodput, samples/s",
    *(f"{kind} {name}" for kind in ("Response", "Service") for name in ("p50", "p90", "p99", "p99.9")),
    "Issue delay p50",
    "Issue delay p99",
    "Warm-up",
    "Errors",
    "Shed",
    "GPU busy",
    "SM activity",
    "Efficiency",
    "What binds",
)
TEXT_HEADINGS = ("Experiment", "Load", "What binds")


@dataclass(frozen=True, slots=True)
class Section:
    """The runs of one machine."""

    machine: Machine
    cells: tuple[CellNumbers, ...]


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    sections: tuple[Section, ...]
    unreadable: tuple[Unreadable, ...]
    bound_s: float | None  # given by the reader

    @property
    def runs(self) -> tuple[RunNumbers, ...]:
        return tuple(run for section in self.sections for cell in section.cells for run in cell.runs)


@dataclass(frozen=True, slots=True)
class Table:
    """Texts. Rows are as long as `headings`."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_text(self) -> tuple[bool, ...]:
        """Return for each column whether it holds words, which stand to the left."""
        return tuple(heading in TEXT_HEADINGS for heading in self.headings)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of one run in the part on validity."""

    name: str
    counts: bool
    lines: tuple[str, ...]


def build(
    paths: Sequence[Path], *, title: str | None = None, bound_s: float | None = None, step: Step | None = None
) -> Report:
    """Read all runs at or below `paths`. Raises OutputError where there is none, or none that can be read."""
    runs: list[Run] = []
    unreadable: list[Unreadable] = []
    for name, folder in find_folders(paths):
        try:
            runs.append(read_run(name, folder))
        except OutputError as error:
            unreadable.append(Unreadable(name=name, reason=str(error)))
    sections = []
    found = machines(runs)
    total, done = sum(len(machine.cells) for machine in found), 0
    for machine in found:
        cells = []
        for cell in machine.cells:
            numbers, lost = compute_cell(cell, bound_s)
            unreadable += lost
            cells += [numbers] if numbers else []
            done += 1
            if step:
                step(done, total)
        if cells:
            sections.append(Section(machine, tuple(cells)))
    if not sections:
        raise OutputError(f"no run can be read; the first one: {unreadable[0].reason}")
    return Report(
        title or ", ".join(path.resolve().name for path in paths), tuple(sections), tuple(unreadable), bound_s
    )


def headline(cells: Sequence[CellNumbers]) -> Table:
    """Return a row for each cell. Percentiles are of all values of all runs that count."""
    rows = [_headline_row(cell) for cell in cells]
    return Table(HEADINGS, tuple(rows))


def _headline_row(numbers: CellNumbers) -> tuple[str, ...]:
    cell, good = numbers.cell, numbers.good
    runs = str(len(good)) if len(good) == len(numbers.runs) else f"{len(good)} of {len(numbers.runs)}"
    rates = numbers.throughputs
    return (
        cell.label,
        str(cell.batch_size),
        digits(numbers.throughput),
        runs,
        f"{digits(min(rates))} to {digits(max(rates))}" if len(rates) > 1 else NOTHING,
        cell.load_words,
        digits(numbers.goodput),
        *_percentiles(numbers.response, "p50", "p90", "p99", "p99.9"),
        *_percentiles(numbers.service, "p50", "p90", "p99", "p99.9"),
        *_percentiles(numbers.issue_delay, "p50", "p99"),
        duration(numbers.warmup_s),
        f"{numbers.errors:,}",
        f"{sum(run.metrics.shed for run in numbers.runs):,}",
        percent(mean([run.gpu_pct for run in good])),
        percent(mean([run.activity.sm_activity_pct for run in good])),
        NOTHING if numbers.efficiency is None else f"{numbers.efficiency:.3f}",
        numbers.binds or NOTHING,
    )


def _percentiles(tail: Tail | None, *names: str) -> tuple[str, ...]:
    return tuple(duration(tail.percentiles.get(name) if tail else None) for name in names)


def best_sentence(cells: Sequence[CellNumbers]) -> str:
    """Say which cell was fastest, and what bounds it."""
    rated = [cell for cell in cells if cell.throughput]
    if not rated:
        return "No run counts, so nothing is compared; the reasons stand under Validity."
    best = max(rated, key=lambda cell: cell.throughput or 0.0)
    text = f"Highest throughput: {digits(best.throughput)} samples/s, by {best.cell.label} at batch size"
    text += f" {best.cell.batch_size} ({best.cell.load_words})"
    if best.efficiency is not None:
        text += f", {best.efficiency:.2f} of what {best.binds} allows"
    return text + "."


def environment_rows(section: Section) -> list[tuple[str, str]]:
    """Return what the runs were made with. Values that differ between runs stand side by side."""
    summaries = [run.summary for run in section.machine.runs]
    where = summaries[0].environment
    torch = next((each.torch for each in summaries if each.torch), None)
    models = dict.fromkeys(_model_of(each) for each in summaries)
    sides = dict.fromkeys(_input_of(each) for each in summaries)
    clocks = (
        f"up to {where.gpu_max_sm_clock_mhz} MHz (SM), {where.gpu_max_memory_clock_mhz} MHz (memory)"
        if where.gpu_max_sm_clock_mhz
        else ""
    )
    pcie = f"generation {where.pcie_generation}, {where.pcie_width} lanes" if where.pcie_generation else ""
    rows = [
        ("GPU", where.gpu_name or "none"),
        ("GPU memory", f"{where.gpu_memory_bytes / 2**30:.0f} GiB" if where.gpu_memory_bytes else ""),
        ("GPU driver", where.gpu_driver or ""),
        ("GPU power limit", f"{where.gpu_power_limit_w:g} W" if where.gpu_power_limit_w else ""),
        ("GPU clocks", clocks),
        ("PCIe", pcie),
        ("CPU", f"{where.cpu_model}, {where.cpu_count} logical CPUs for a run"),
        ("Memory", f"{where.memory_bytes / 2**30:.0f} GiB"),
        ("Platform", where.platform),
        ("Python", where.python),
        ("torch", f"{torch.torch}, CUDA {torch.cuda}, cuDNN {torch.cudnn}" if torch and torch.cuda else ""),
        ("Packages", ", ".join(f"{name} {version}" for name, version in (where.packages or {}).items())),
        ("Variables", ", ".join(f"{name}={value}" for name, value in (where.variables or {}).items())),
        ("Model and precision", "; ".join(models)),
        ("Input", "; ".join(sides)),
        ("Headrace", ", ".join(revisions(summaries))),
        ("Started", f"{min(each.started_at for each in summaries)} to {max(each.started_at for each in summaries)}"),
    ]
    return [(name, value) for name, value in rows if value]


def _model_of(run: RunSummary) -> str:
    target = run.options.target
    return f"{run.options.model.name}, {run.options.precision}" if target is None else target.experiment


def _input_of(run: RunSummary) -> str:
    if run.target is not None:
        return ", ".join(f"{name} {text}" for name, text in run.target.inputs.items())
    return f"{run.options.inputs.image_size} px, {run.options.inputs.wire}"


def verdicts(section: Section) -> list[Verdict]:
    """Return every run that does not count, or of which something must be known; those that do not count first."""
    runs = [run for cell in section.cells for run in cell.runs]
    said = [
        Verdict(run.run.name, run.counts, (*run.reasons, *run.remarks)) for run in runs if run.reasons or run.remarks
    ]
    return sorted(said, key=lambda verdict: (verdict.counts, verdict.name))


def shared_remarks(said: Sequence[Verdict]) -> list[tuple[str, tuple[str, ...]]]:
    """Return each remark on runs that count with those runs' names: many runs say the same."""
    by_line: dict[str, list[str]] = {}
    for verdict in said:
        for line in verdict.lines if verdict.counts else ():
            by_line.setdefault(line, []).append(verdict.name)
    return [(line, tuple(names)) for line, names in by_line.items()]


def commands(section: Section) -> list[tuple[str, str]]:
    """Return each cell's command, as it was typed for its first run."""
    return [
        (f"{cell.cell.label}, batch size {cell.cell.batch_size}, {cell.cell.load_words}", command_of(cell.cell.runs[0]))
        for cell in section.cells
    ]


def command_of(run: Run) -> str:
    return shlex.join(run.summary.command)


def calibrations(section: Section) -> list[dict[str, object]]:
    """Return what the harness itself can do there, each distinct one once; runs of older versions do not say."""
    told = [run.summary.calibration for run in section.machine.runs if run.summary.calibration is not None]
    distinct = [each for at, each in enumerate(told) if each not in told[:at]]
    found: list[dict[str, object]] = [msgspec.to_builtins(each) for each in distinct]
    return found


METHOD = (
    "Response time: answer - when the plan wanted the request sent. Service time: answer - when it was sent. Issue"
    " delay: the difference of the two. Throughput: samples answered rightly / (last answer - first planned sending),"
    " warm-up apart; mean of the runs. Goodput: the same, of answers within the latency bound. Percentiles are of all"
    " values of all runs of a cell that count, linear between order statistics, and are left out where there are too"
    " few values for one to lie beyond them (p99.9: 1,000). Warm-up: first request to first answer, median of the runs."
    " Errors: requests that failed, were answered wrongly, or never. GPU busy: share of polled time with any kernel"
    " running, which says little of how much of the GPU worked; SM activity does. Efficiency: throughput / the smallest"
    " limit measured in the same process, which is named."
)
SOURCES = (
    "Computed from requests.parquet and telemetry.parquet of each run. What only a summary.json holds, since it is a"
    " measurement of its own (SM activity, limits, parts of the warm-up latency, environment), is taken from there."
    " Where a summary's metrics are not those of its records, the run does not count, and is named."
)
