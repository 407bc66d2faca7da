"""Finished runs with their requests: every number of a comparison is computed from these, where a run has kept them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.bench import stats, validity
from headrace.bench.record import Records, measured, read_records
from headrace.bench.steady import Steadiness, is_steady
from headrace.bench.summary import RunSummary
from headrace.clock import NS_PER_S
from headrace.errors import OutputError
from headrace.study.finished import FoundRun

RECORDS = "requests.parquet"
_OF_A_SWEEP = re.compile(r"r(\d+)-")  # how a sweep names the folders of its runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A run's measured requests, all of them answered, in the order of the plan."""

    response_s: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int32]
    window_s: float
    steadiness: Steadiness

    def goodput(self, bound_s: float) -> float:
        """Return the rows per second that were answered within the bound."""
        return float(self.rows[self.response_s <= bound_s].sum()) / self.window_s


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run as it is compared. `summary` holds the metrics computed anew from the records, where there are any."""

    summary: RunSummary
    sample: Sample | None = None  # None: no records were kept, or not every request was answered rightly
    has_records: bool = False
    overloaded: bool = False  # the backlog grew all through the run: it has no latency
    repeat: int | None = None  # the block of a sweep


def read_run(found: FoundRun) -> MeasuredRun:
    """Read a run's records, if it kept them. Raises OutputError where they cannot be read."""
    numbered = _OF_A_SWEEP.match(found.folder.name)
    repeat = int(numbered[1]) if numbered else None
    path = found.folder / RECORDS
    if not path.is_file():
        return MeasuredRun(summary=found.summary, repeat=repeat)
    records = _read(path)
    judged = validity.judge(records, found.summary.options.load)
    metrics = judged.metrics
    return MeasuredRun(
        summary=replace(found.summary, metrics=metrics),
        sample=_sample(records, metrics) if metrics.throughput_samples_per_s else None,
        has_records=True,
        overloaded=bool(judged.verdict.overload),
        repeat=repeat,
    )


def pooled_percentile(samples: Sequence[Sample], percentile: float) -> float:
    """Return a percentile of all requests of all runs together, interpolated as a run's own is."""
    return float(np.percentile(np.concatenate([sample.response_s for sample in samples]), percentile))


def _read(path: Path) -> Records:
    try:
        return read_records(path)
    except (OSError, ValueError) as error:  # pyarrow's errors of damaged files are ValueErrors
        raise OutputError(f"{path}: cannot be read ({error}); remove the run, or measure it again") from error


def _sample(records: Records, metrics: stats.Metrics) -> Sample:
    counted = measured(records)
    counted = counted[np.argsort(counted["scheduled_ns"], kind="stable")]
    response_ns = counted["completed_ns"] - counted["scheduled_ns"]
    return Sample(
        response_s=response_ns / NS_PER_S,
        rows=counted["rows"],
        window_s=metrics.window_s or 0.0,
        steadiness=is_steady(counted["scheduled_ns"], response_ns),
    )
