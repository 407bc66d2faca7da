"""A sweep: every planned run in turn, each in a fresh process, resumable, with tables after every block.

A folder with a good summary is done for ever; anything else is made again. So a sweep that was interrupted,
however rudely, goes on by starting it again with the same options and the same folder.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Protocol

import numpy as np

from headrace.bench.summary import FILE_NAME as SUMMARY_FILE
from headrace.bench.summary import encode, load_summary
from headrace.clock import Clock, now_ns, seconds
from headrace.errors import OutputError, RunFailed
from headrace.files import write_whole, writing
from headrace.study.finished import RUNS, counts, error_file, load_runs, missing_runs
from headrace.study.plan import FILE_NAME as PLAN_FILE
from headrace.study.plan import LeftOut, Plan, PlannedRun, SweepConfig, differing_options, load_plan
from headrace.study.tables import write_tables

TABLES = "tables"
FAILURES_AT_START = 3  # in a row, with nothing good yet: the cause is not the cell


class Executor(Protocol):
    """Runs one planned run to its end and writes its folder.

    Returns None if it ended well, else one line that says why not. What it raises ends the sweep.
    """

    def __call__(self, planned: PlannedRun, run_dir: Path) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run of this sweep ended."""

    planned: PlannedRun
    duration_s: float
    error: str | None  # first line; None if it ended well


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepStep:
    """Where the sweep stands before each run, and once more at the end."""

    done: int  # runs that are over, earlier ones included
    total: int
    name: str | None  # of the run that starts now; None at the end
    time_left_s: float | None  # None while nothing was measured to judge by
    last: RunOutcome | None  # of the run before


class SweepProgress(Protocol):
    """Told of every step."""

    def __call__(self, step: SweepStep) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """What became of a sweep that came to its end."""

    total: int
    skipped: int  # found finished
    succeeded: int
    failures: tuple[RunOutcome, ...]
    left_out: tuple[LeftOut, ...]
    tables: tuple[Path, ...]  # files written


def run_sweep(
    config: SweepConfig,
    output_dir: Path,
    execute: Executor,
    progress: SweepProgress,
    clock: Clock = now_ns,
) -> SweepOutcome:
    """Make every run of the plan that is not finished yet.

    One failed run does not end the sweep. Raises RunFailed where the first three all fail; OutputError where
    the folder belongs to another plan or to a sweep that is running, or cannot be written; IncomparableRuns
    where the environment changed since the folder's earlier runs; InvalidOption for options that no run could
    use.
    """
    asked = Plan.of(config)
    with writing(output_dir):
        (output_dir / RUNS).mkdir(parents=True, exist_ok=True)
    with _locked(output_dir):
        plan = _settled(asked, output_dir)
        return _Sweep(plan=plan, folder=output_dir, execute=execute, progress=progress, clock=clock).run()


def estimate_s(remaining: Sequence[PlannedRun], done: Sequence[RunOutcome]) -> float | None:
    """Return how long the remaining runs will take by the good ones done; None while there is none.

    A run takes the mean of its cell's (batch size, compile). A cell not seen yet takes a straight line
    through the runs of the same compile (else of all), since a run's time is a start-up and then grows with
    the batch size.
    """
    good = [outcome for outcome in done if outcome.error is None]
    if not good:
        return None
    return sum(_estimate_one(run, good) for run in remaining)


def _estimate_one(run: PlannedRun, good: Sequence[RunOutcome]) -> float:
    mode = [outcome for outcome in good if outcome.planned.compile == run.compile]
    cell = [outcome.duration_s for outcome in mode if outcome.planned.batch_size == run.batch_size]
    if cell:
        return fmean(cell)
    alike = mode or good
    sizes = [float(outcome.planned.batch_size) for outcome in alike]
    durations = [outcome.duration_s for outcome in alike]
    if len(set(sizes)) == 1:
        return fmean(durations)
    slope, start = np.polyfit(sizes, durations, 1)
    return max(float(start + slope * run.batch_size), min(durations))


@dataclass(slots=True, kw_only=True)
class _Sweep:
    plan: Plan
    folder: Path
    execute: Executor
    progress: SweepProgress
    clock: Clock
    pending: list[PlannedRun] = field(default_factory=list)
    outcomes: list[RunOutcome] = field(default_factory=list)
    tables: tuple[Path, ...] = ()

    def run(self) -> SweepOutcome:
        self.pending = [run for run in self.plan.runs if not _is_finished(self._run_dir(run))]
        skipped = len(self.plan.runs) - len(self.pending)
        for _, block in groupby(list(self.pending), key=lambda run: run.repeat):
            for planned in block:
                self._tell(planned.name)
                self.outcomes.append(self._make(planned))
                self.pending.remove(planned)
                self._end_if_hopeless(skipped)
            self._write_tables()
        self._tell(None)
        if not self.outcomes:
            self._write_tables()
        return self._outcome(skipped)

    def _make(self, planned: PlannedRun) -> RunOutcome:
        run_dir = self._run_dir(planned)
        with writing(run_dir):
            _clear(run_dir)
            error_file(self.folder, planned).unlink(missing_ok=True)
        started = self.clock()
        error = self.execute(planned, run_dir)
        duration_s = seconds(self.clock() - started)
        error = _judge(run_dir, error)
        if error is not None:
            write_whole(error_file(self.folder, planned), error + "\n")
        return RunOutcome(planned=planned, duration_s=duration_s, error=error)

    def _end_if_hopeless(self, skipped: int) -> None:
        if skipped or len(self.outcomes) != FAILURES_AT_START or not all(item.error for item in self.outcomes):
            return
        last = self.outcomes[-1]
        raise RunFailed(
            f"the first {FAILURES_AT_START} runs all failed, the last one with: {last.error}; see"
            f" {self._run_dir(last.planned)}.log, mend the cause and start the same sweep again"
        )

    def _tell(self, name: str | None) -> None:
        total = len(self.plan.runs)
        self.progress(
            SweepStep(
                done=total - len(self.pending),
                total=total,
                name=name,
                time_left_s=estimate_s(self.pending, self.outcomes),
                last=self.outcomes[-1] if self.outcomes else None,
            )
        )

    def _write_tables(self) -> None:
        if any((self.folder / RUNS).glob(f"*/{SUMMARY_FILE}")):
            runs, missing = load_runs(self.folder), missing_runs(self.folder)
            self.tables = tuple(write_tables(runs, self.folder / TABLES, missing))

    def _outcome(self, skipped: int) -> SweepOutcome:
        failures = tuple(outcome for outcome in self.outcomes if outcome.error)
        return SweepOutcome(
            total=len(self.plan.runs),
            skipped=skipped,
            succeeded=len(self.outcomes) - len(failures),
            failures=failures,
            left_out=self.plan.left_out,
            tables=self.tables,
        )

    def _run_dir(self, planned: PlannedRun) -> Path:
        return self.folder / RUNS / planned.name


def _settled(asked: Plan, folder: Path) -> Plan:
    """Return the folder's plan, written now if it had none. Raises OutputError where it had another."""
    planned = load_plan(folder)
    if planned is None:
        write_whole(folder / PLAN_FILE, encode(asked))
        return asked
    if different := differing_options(planned.config, asked.config):
        raise OutputError(
            f"{folder}: holds a sweep with other options ({'; '.join(different)}); go on with the same"
            " options, or choose another folder"
        )
    return planned


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / SUMMARY_FILE).is_file() and counts(load_summary(run_dir))


def _judge(run_dir: Path, error: str | None) -> str | None:
    """Return why an attempt does not count. The summary knows best; without it, the process's end must do."""
    if not (run_dir / SUMMARY_FILE).is_file():
        return error or "it ended without an error and without a summary; this is a fault of Headrace"
    summary = load_summary(run_dir)
    if summary.error is not None:
        return (summary.error.strip().splitlines() or ["failed, without a reason"])[0]
    if not counts(summary):
        return error or "its answers are incomplete or wrong"
    return None  # written last of all: what happened while the process went away changes no number


def _clear(run_dir: Path) -> None:
    """Remove what an earlier attempt left: the folder, or one not yet renamed (NAME.partial and the like)."""
    for entry in run_dir.parent.iterdir():
        if entry.is_dir() and entry.name.strip(".").partition(".")[0] == run_dir.name:
            shutil.rmtree(entry)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this sweep alone. The kernel lets go when the process ends, however it ends."""
    with writing(folder):
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another sweep is running there; wait for its end, or choose another folder"
            ) from error
        yield
