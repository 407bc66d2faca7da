"""Make the page and the chart of what `benchmarks/lanes.sh` measured: `python benchmarks/lanes_report.py DIR`.

Reads every DIR/runs/CELL.REPEAT/summary.json, where CELL is SERIES-bBATCH, and writes DIR/report.md and DIR/chart.png.
A row is a cell: its repeats together.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headrace.bench.environment import differences
from headrace.bench.summary import FILE_NAME, Environment, RunSummary, load_summary
from headrace.files import write_whole
from headrace.study.finished import counts, revisions, unlike

RECOMPILES = "recompiles while serving: "
EXCLUDED = "Runs with errors or wrong answers are listed, and have no throughput."
SECTIONS = (
    "served / raw",
    "client that copies",
    "dynamic batching",
    "one request at a time, and profiled",
    "ablation",
    "published designs",
)
COLUMNS = (
    "cell",
    "design",
    "lanes or workers",
    "transport",
    "client",
    "precision",
    "compile",
    "wire",
    "batch",
    "runs",
    "samples/s, mean (min to max)",
    "service time p50, ms",
    "p99, ms",
    "raw best, samples/s",
    "served / raw",
    "efficiency",
    "what binds",
    "SM activity, %",
    "warm-up, s",
    "of that compile, s",
    "recompiles",
)
TEXT_COLUMNS = 8  # the first, aligned to the left


@dataclass(frozen=True, slots=True)
class Run:
    """One run and the name of its folder, without and with the repeat."""

    cell: str
    name: str
    summary: RunSummary


@dataclass(frozen=True, slots=True)
class Cell:
    """The repeats of one cell, at least one. Only `good` ones have numbers."""

    name: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> RunSummary:
        return self.runs[0].summary

    @property
    def good(self) -> list[RunSummary]:
        return [run.summary for run in self.runs if counts(run.summary)]

    @property
    def series(self) -> str:
        return self.name.rpartition("-b")[0] or self.name

    @property
    def batch(self) -> int:
        return self.first.options.inputs.batch_size

    @property
    def throughputs(self) -> list[float]:
        return [run.metrics.throughput_samples_per_s or 0.0 for run in self.good]

    @property
    def raws(self) -> list[float]:
        return numbers(self.good, raw)

    @property
    def section(self) -> str:
        options = self.first.options
        if self.series.startswith("ablation-"):
            return "ablation"
        if self.series.startswith("published-"):
            return "published designs"
        if options.profile or options.transport.ring_slots == 1:
            return "one request at a time, and profiled"
        if options.lanes.buckets[-1] > options.inputs.batch_size:
            return "dynamic batching"
        return "client that copies" if options.transport.client == "copy" else "served / raw"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page and the chart of what benchmarks/lanes.sh measured.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds runs/CELL.REPEAT/summary.json")
    folder = parser.parse_args().folder
    cells = read_cells(folder)
    if not cells:
        parser.error(f"{folder / 'runs'}: no finished run there; make some with benchmarks/lanes.sh {folder}")
    write_whole(folder / "report.md", render(cells))
    draw(cells, folder / "chart.png")


def read_cells(folder: Path) -> list[Cell]:
    """Return all cells, by series and batch size. Raises OutputError for a summary of another version."""
    by_name: dict[str, list[Run]] = {}
    for path in sorted((folder / "runs").glob(f"*/{FILE_NAME}")):
        name = path.parent.name
        run = Run(re.sub(r"\.\d+$", "", name), name, load_summary(path.parent))
        by_name.setdefault(run.cell, []).append(run)
    cells = [Cell(name, tuple(runs)) for name, runs in by_name.items()]
    return sorted(cells, key=lambda cell: (cell.series, cell.batch, cell.name))


def numbers(runs: Iterable[RunSummary], of: Callable[[RunSummary], float | None]) -> list[float]:
    """Return what the runs say; those that do not say are left out."""
    return [value for value in map(of, runs) if value is not None]


def raw(run: RunSummary) -> float | None:
    """Return samples/s of the model alone, with the best number of streams."""
    return max(run.limits.forward_samples_per_s.values()) if run.limits else None


def served_of_raw(run: RunSummary) -> float | None:
    best, served = raw(run), run.metrics.throughput_samples_per_s
    return served / best if best and served else None


def warm_up(run: RunSummary) -> float | None:
    return sum(run.warmup_parts_s.values()) if run.warmup_parts_s else None


def recompiles(run: RunSummary) -> float | None:
    found = [note.removeprefix(RECOMPILES) for note in run.notes if note.startswith(RECOMPILES)]
    return float(found[0]) if found else None


def service_ms(run: RunSummary, percentile: str) -> float | None:
    times = run.metrics.service_time
    return 1e3 * float(getattr(times, percentile)) if times else None


def row(cell: Cell) -> list[str]:
    """Return a cell's values, one for each of COLUMNS."""
    options, good = cell.first.options, cell.good

    def number(
        of: Callable[[RunSummary], float | None],
        form: str,
        summarise: Callable[[list[float]], float] = statistics.mean,
    ) -> str:
        found = numbers(good, of)
        return format(summarise(found), form) if found else ""

    return [
        cell.name,
        options.design.name,
        str(options.design.num_workers),
        options.transport.name,
        options.transport.client,
        options.precision,
        "yes" if options.model.compile else "no",
        options.inputs.wire,
        str(cell.batch),
        str(len(good)) if len(good) == len(cell.runs) else f"{len(good)} of {len(cell.runs)}",
        spread(cell.throughputs),
        number(lambda run: service_ms(run, "p50"), ".2f", statistics.median),
        number(lambda run: service_ms(run, "p99"), ".2f", statistics.median),
        number(raw, ",.0f"),
        number(served_of_raw, ".3f"),
        number(lambda run: run.efficiency.ratio if run.efficiency else None, ".3f"),
        ", ".join(sorted({run.efficiency.binding for run in good if run.efficiency})),
        number(lambda run: run.activity.sm_activity_pct, ".1f"),
        number(warm_up, ".1f", statistics.median),
        number(lambda run: run.warmup_parts_s.get("compile"), ".1f", statistics.median),
        number(recompiles, ".0f", max),
    ]


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.0f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.0f} to {max(values):,.0f})"


def render(cells: Sequence[Cell]) -> str:
    """Return the page."""
    parts = ["# Lanes: what was measured", *header([run.summary for cell in cells for run in cell.runs])]
    for section in SECTIONS:
        rows = [row(cell) for cell in cells if cell.section == section]
        if rows:
            parts += [f"## {section[0].upper()}{section[1:]}", table(rows)]
    parts += failures(cells)
    return "\n\n".join(parts) + "\n"


def header(runs: Sequence[RunSummary]) -> list[str]:
    """Say where the runs were made, and how to read the tables."""
    where = runs[0].environment
    unlike_environments = dict.fromkeys(line for run in runs for line in differences(where, run.environment))
    lines = [
        f"- Machine: {machine(where, runs[0].options.device)}",
        f"- Versions: {versions(runs)}",
        f"- Revision: headrace {', '.join(revisions(runs))}",
        f"- Model {', '.join(sorted({run.options.model.name for run in runs}))}; chart: [chart.png](chart.png)",
        f"- {EXCLUDED}",
    ]
    warnings = [f"- **Not all runs are alike**: {line}" for line in unlike_environments]
    reading = (
        "Throughput, raw, ratios and SM activity are means over a cell's good runs; times are medians over them; of"
        " recompiles the most. *Raw* is the model alone, the best of several numbers of streams, on data that is on the"
        " device, measured in the same process after the run; *efficiency* is throughput / the smallest limit, which is"
        " named. A ratio above 1 shows how far off a limit can be, which is measured for a fraction of a second."
        " Requests are sent as fast as the transport takes them, so service time is mostly waiting in line."
    )
    return ["\n".join([*lines, *warnings]), reading]


def machine(where: Environment, device: str) -> str:
    parts = [
        f"{where.gpu_name} (driver {where.gpu_driver})" if where.gpu_name and device != "cpu" else "",
        f"{where.cpu_model}, {where.cpu_count} CPUs for each run, {where.memory_bytes / 2**30:.0f} GiB",
        where.platform,
    ]
    return "; ".join(part for part in parts if part)


def versions(runs: Sequence[RunSummary]) -> str:
    where = runs[0].environment
    torch = next((run.torch for run in runs if run.torch), None)
    cuda = f", CUDA {torch.cuda}, cuDNN {torch.cudnn}" if torch and torch.cuda else ""
    packages = ", ".join(f"{name} {version}" for name, version in (where.packages or {}).items())
    return f"Python {where.python}, {packages}{cuda}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns that are empty in every row are left out."""
    kept = [at for at in range(len(COLUMNS)) if any(cells[at] for cells in rows)]
    lines = [
        [COLUMNS[at] for at in kept],
        ["---" if at < TEXT_COLUMNS else "---:" for at in kept],
        *([cells[at] or "-" for at in kept] for cells in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(cells: Sequence[Cell]) -> list[str]:
    """Return the runs that do not count, and the cells whose runs differ in more than the repeat."""
    bad = [
        f"- `{run.name}`: {run.summary.error or 'no throughput'}"
        for cell in cells
        for run in cell.runs
        if not counts(run.summary)
    ]
    mixed = [f"- `{cell.name}`: {line}" for cell in cells for line in unlike([run.summary for run in cell.runs])]
    parts = ["## Runs that do not count", "\n".join(bad)] if bad else []
    return [*parts, "## Cells whose runs are unlike", "\n".join(mixed)] if mixed else parts


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw throughput by batch size, a line for each series, with what the model alone does dashed beside it."""
    shown = [cell for cell in cells if cell.throughputs and charted(cell)]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys(cell.series for cell in shown)):
        draw_series(
            axes, [cell for cell in shown if cell.series == series], f"C{number % 10}", "osD^vPX*<>"[number % 10]
        )
    batches = sorted({cell.batch for cell in shown})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rows of a request")
    axes.set_ylabel("samples/s")
    first = cells[0].first
    device = first.environment.device_name(first.options.device)
    axes.set_title(
        f"Served (solid; bars: least to most of the runs) and the model alone (dashed)\n{device}", fontsize=11
    )
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=140)


def charted(cell: Cell) -> bool:
    """Leave out what is about something else than throughput by batch size."""
    return cell.section not in ("ablation", "one request at a time, and profiled")


def draw_series(axes: Axes, cells: Sequence[Cell], colour: str, marker: str) -> None:
    """Draw one series; `cells` are ascending by batch size."""
    batches = [cell.batch for cell in cells]
    means = [statistics.mean(cell.throughputs) for cell in cells]
    below = [mean - min(cell.throughputs) for mean, cell in zip(means, cells, strict=True)]
    above = [max(cell.throughputs) - mean for mean, cell in zip(means, cells, strict=True)]
    axes.errorbar(batches, means, yerr=[below, above], label=cells[0].series, capsize=3, color=colour, marker=marker)
    limits = [(cell.batch, statistics.mean(cell.raws)) for cell in cells if cell.raws]
    axes.plot([batch for batch, _ in limits], [rate for _, rate in limits], color=colour, linestyle="--", alpha=0.6)
    if len(limits) == 1:  # a line of one point is none
        axes.plot(*limits[0], color=colour, marker="_", markersize=18, markeredgewidth=2)


if __name__ == "__main__":
    main()
