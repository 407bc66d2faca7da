"""Result tables of finished runs: the published form, a wide one of what the machine did, and a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from headrace.bench import columns
from headrace.bench.environment import differences as environment_differences
from headrace.bench.summary import RunSummary
from headrace.errors import IncomparableRuns
from headrace.files import write_whole
from headrace.study import quantities
from headrace.study.finished import (
    CellKey,
    Differences,
    MissingRun,
    counts,
    experiment_rank,
    experiments,
    has_wrong_answers,
    machine,
    revisions,
    several_targets,
    unlike,
)
from headrace.study.quantities import Quantity

HEADER = (
    "Experiment",
    "Warmup_latency (s)",
    "Average_latency (s)",
    "Throughput (samples/sec)",
    "GPU Utilization (%)",
)

MEANING = (
    "mean +/- sample standard deviation over runs, each a fresh process. Warmup_latency: the first response,"
    " with model load, compile and first run in it. Average_latency: mean response time (completed -"
    " scheduled); all requests are sent at once, so it is mostly time spent waiting in the queue. Throughput:"
    " samples answered / (last completed - first scheduled), after warm-up. GPU Utilization: share of time"
    " with any kernel running (NVML utilization.gpu), which says little about how busy the GPU was; empty"
    " where there is no GPU."
)
WIDE_MEANING = (
    "p50 and p99 response time: median of the runs' values (smallest to largest), since percentiles of runs"
    " cannot be averaged. The rest: mean +/- sample standard deviation. SM and tensor activity, PCIe: NVML"
    " GPM metrics; power: energy counter / time; CPU: of all logical CPUs. Empty where the machine does not"
    " say."
)

Missing = Sequence[MissingRun]


def write_tables(
    runs: Sequence[RunSummary],
    output_dir: Path,
    missing: Missing = (),
    differences: Differences = environment_differences,
) -> list[Path]:
    """Write `output_{batch_size}_{compile}.md` per cell, `all.md` and `runs.csv`; return their paths.

    `missing` are attempts that left no summary; they are counted as failed. Callers give at least 1 run.
    Raises IncomparableRuns where the runs' environments or options are unlike, OutputError where a file
    cannot be written.
    """
    if different := (*unlike(runs, differences), *several_targets(runs)):
        raise IncomparableRuns(
            "these runs cannot stand in one table, since more differs than the design: "
            + "; ".join(different)
            + "; keep them in separate folders"
        )
    files = {_file_name(key): render_table(key, runs, missing) for key in _keys(runs, missing)}
    files["all.md"] = render_all(runs, missing)
    files["runs.csv"] = render_csv(runs)
    for name, text in files.items():
        write_whole(output_dir / name, text)
    return [output_dir / name for name in files]


def render_table(key: CellKey, runs: Sequence[RunSummary], missing: Missing = ()) -> str:
    """Return one table in the published form, with what a reader must know under it."""
    return f"{_published(key, runs, missing)}\nColumns: {MEANING}\n\nMachine: {machine(runs)}.\n"


def render_all(runs: Sequence[RunSummary], missing: Missing = ()) -> str:
    """Return every table in one page: the published form, then the wide form, then notes."""
    keys = _keys(runs, missing)
    parts = [
        "# Results",
        f"Machine: {machine(runs)}.",
        *(_published(key, runs, missing).rstrip("\n") for key in keys),
        f"Columns: {MEANING}",
        "# What the machine did",
        *(_wide(key, runs) for key in keys),
        f"Columns: {WIDE_MEANING}",
        *_failure_list(runs, missing),
        *_notes(runs),
    ]
    return "\n\n".join(parts) + "\n"


def render_csv(runs: Iterable[RunSummary]) -> str:
    """Return one row per run, failed ones included; an empty field is a value that the run does not have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns.row(run) for run in runs)
    return text.getvalue()


def spread(quantity: Quantity, runs: Sequence[RunSummary]) -> str:
    """Return the cell of one quantity over runs; empty where none of them has it."""
    values = quantity.values(runs)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f} (1 run)"
    if quantity.is_percentile:
        return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    return f"{fmean(values):.3f} +/- {stdev(values):.3f}"


def row(cells: Iterable[str]) -> str:
    """Return a Markdown table's row. A bar within a cell would end it."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def heading(cells: Sequence[str]) -> str:
    return row(cells) + "\n" + row("---" for _ in cells)


def title(key: CellKey) -> str:
    return f"## Batch Size {key.batch_size} Compile {str(key.compile).lower()}"


def _published(key: CellKey, runs: Sequence[RunSummary], missing: Missing) -> str:
    lines = [title(key), "", heading(HEADER)]
    notes = []
    for experiment in _experiments(key, runs, missing):
        attempts = [run for run in runs if CellKey.of(run) == key and run.experiment == experiment]
        good = [run for run in attempts if counts(run)]
        lost = sum(_key_of(item) == key and item.planned.experiment == experiment for item in missing)
        lines.append(row([experiment, *(spread(quantity, good) for quantity in quantities.PUBLISHED)]))
        notes.append(f"{experiment} {_run_count(attempts, lost)}")
    return "\n".join([*lines, "", f"Runs per row: {', '.join(notes)}.", ""])


def _run_count(attempts: Sequence[RunSummary], lost: int) -> str:
    good = sum(counts(run) for run in attempts)
    wrong = sum(has_wrong_answers(run) for run in attempts)
    failed = len(attempts) - good - wrong + lost
    words = [f"{failed} failed" if failed else "", f"{wrong} with wrong answers" if wrong else ""]
    left_out = ", ".join(word for word in words if word)
    return f"{good} ({left_out}, not averaged in)" if left_out else str(good)


def _wide(key: CellKey, runs: Sequence[RunSummary]) -> str:
    good = [run for run in runs if CellKey.of(run) == key and counts(run)]
    names = [f"{quantity.name} ({quantity.unit})" for quantity in quantities.WIDE]
    lines = [title(key), "", heading(["Experiment", *names])]
    for experiment in experiments(good):
        own = [run for run in good if run.experiment == experiment]
        lines.append(row([experiment, *(spread(quantity, own) for quantity in quantities.WIDE)]))
    return "\n".join(lines)


def _failure_list(runs: Sequence[RunSummary], missing: Missing) -> list[str]:
    lines = [
        f"- {run.experiment}, batch size {run.options.inputs.batch_size}, started {run.started_at}:"
        f" {run.error or 'incomplete or wrong answers'}"
        for run in runs
        if not counts(run)
    ]
    lines += [f"- {item.planned.name}: {item.error}" for item in missing]
    return ["# Runs that do not count", "\n".join(lines)] if lines else []


def _notes(runs: Sequence[RunSummary]) -> list[str]:
    """Return what the runs say a reader must know, and that the code changed between them if it did."""
    notes = [f"- {note}" for note in dict.fromkeys(note for run in runs for note in run.notes)]
    if len(revisions(runs)) > 1:
        notes.append(f"- The runs were made by {len(revisions(runs))} revisions of the code; see runs.csv.")
    return ["# Notes", "\n".join(notes)] if notes else []


def _keys(runs: Iterable[RunSummary], missing: Missing) -> list[CellKey]:
    return sorted({CellKey.of(run) for run in runs} | {_key_of(item) for item in missing})


def _key_of(item: MissingRun) -> CellKey:
    return CellKey(compile=item.planned.compile, batch_size=item.planned.batch_size)


def _experiments(key: CellKey, runs: Iterable[RunSummary], missing: Missing) -> list[str]:
    names = {run.experiment for run in runs if CellKey.of(run) == key}
    names |= {item.planned.experiment for item in missing if _key_of(item) == key}
    return sorted(names, key=experiment_rank)


def _file_name(key: CellKey) -> str:
    return f"output_{key.batch_size}_{str(key.compile).lower()}.md"
