"""What runs show of batches, transports and pauses: read from their folders and refused where they cannot be used.

What the stamps mean. `computed` of a lane's batch is when the host saw that it had ended, so the time on the lane ends
there. `started` is when it was launched, which with a lane depth above 1 is before it runs: it begins when the batch in
front of it on the same lane ends. Runs of other designs than lanes, and of servers by URL, show requests only: each
counts as a batch of its own from its issue to its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.bench.record import STATUSES, Records, measured, read_records
from headrace.bench.summary import FILE_NAME, RunSummary, load_summary
from headrace.clock import NS_PER_S
from headrace.errors import IncomparableRuns, OutputError, RunFailed
from headrace.pipeline.batch import BatchingConfig, bucket_of
from headrace.study.finished import counts, unlike

RECORDS = "requests.parquet"
# What a model of the server may be asked for, so that runs may differ in it; of the lanes, not how the model is made.
MAY_DIFFER = (
    "load.",
    "inputs.batch_size",
    "inputs.distinct_images",
    "inputs.memory_limit_bytes",
    "inputs.seed",
    "design.num_workers",
    "lanes.buckets",
    "lanes.max_queue_delay_us",
    "lanes.depth",
    "transport.ring_slots",
    "model.model_dir",
    "model.compile_cache",
    "model.download",
    "limits",
    "target.generators",
    "target.label",
    "target.connections",
)

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Batches:
    """One entry per batch: seconds that it ran, and rows that were computed, those of its bucket where it is padded."""

    seconds: Seconds
    rows: npt.NDArray[np.int64]
    waited: Seconds  # between its launch and the end of the one in front of it on its lane; 0 where there was none
    sure: npt.NDArray[np.bool_]  # its end was seen by itself, not together with that of a neighbour on its lane
    start_ns: npt.NDArray[np.int64]

    def begun(self, idle_s: Callable[[int], float]) -> Batches:
        """Return them from when their beginning was over, which takes so long by their rows unless they waited longer.

        At most half of a batch's time is its beginning.
        """
        sizes, which = np.unique(self.rows, return_inverse=True)
        beginning = np.array([idle_s(int(size)) for size in sizes])[which]
        late = np.minimum(np.maximum(beginning - self.waited, 0.0), self.seconds / 2)
        start_ns = self.start_ns + np.rint(late * NS_PER_S).astype(np.int64)
        return replace(self, seconds=self.seconds - late, start_ns=start_ns)

    def running(self, work_s: Callable[[int], float]) -> Seconds:
        """Return how many ran on average while each batch did, itself among them, in batches like itself.

        Another one counts by what it takes of a full device, `work_s` of its rows.
        """
        end_ns = self.start_ns + np.rint(self.seconds * NS_PER_S).astype(np.int64)
        sizes, which = np.unique(self.rows, return_inverse=True)
        work = np.array([work_s(int(size)) for size in sizes])[which]
        moments = np.concatenate([self.start_ns, end_ns])
        order = np.argsort(moments, kind="stable")
        moments = moments[order]
        load = np.cumsum(np.concatenate([work, -work])[order])
        area = np.r_[0.0, np.cumsum(load[:-1] * np.diff(moments))]
        # Moments are small numbers, so that float64 tells nanoseconds apart.
        until = [np.interp(at - moments[0], moments - moments[0], area) for at in (self.start_ns, end_ns)]
        return np.asarray(np.maximum((until[1] - until[0]) / (end_ns - self.start_ns) / work, 1.0))


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine as it is simulated. `rows` is of a request; all have as many."""

    rows: int
    batching: BatchingConfig
    lanes: int
    depth: int
    padded: bool = True  # batches are computed with as many rows as their buckets have

    def computed(self, rows: int) -> int:
        """Return how many rows of a batch of `rows` are computed."""
        return bucket_of(rows, self.batching) if self.padded else rows

    @property
    def words(self) -> str:
        delay = f", delay {self.batching.max_queue_delay_us} us" if self.batching.max_queue_delay_us else ""
        buckets = " ".join(map(str, self.batching.buckets))
        lanes = f"{self.lanes} lane{'s' if self.lanes > 1 else ''} of depth {self.depth}{delay}"
        return f"{self.rows} row{'s' if self.rows > 1 else ''}, buckets {buckets}, {lanes}"


@dataclass(frozen=True, slots=True)
class Observed:
    """A run, its measured requests (all answered rightly) and the batches in which they were computed."""

    name: str
    summary: RunSummary
    records: Records
    batches: Batches
    setup: Setup

    @property
    def staged(self) -> bool:
        """Whether the server's own stamps are there."""
        return _staged(self.summary, self.records)

    @property
    def window_s(self) -> float:
        return float(self.records["completed_ns"].max() - self.records["scheduled_ns"].min()) / NS_PER_S

    @property
    def requests_per_s(self) -> float:
        return len(self.records) / self.window_s

    @property
    def concurrency(self) -> int | None:
        """How many requests were in flight at most; None where that is up to the answers. A burst fills the ring."""
        options = self.summary.options
        if options.load.kind == "closed":
            return options.load.concurrency
        if options.load.kind != "burst":
            return None
        return options.transport.ring_slots if options.transport.name == "ring" and self.staged else self.setup.lanes

    @property
    def cell(self) -> str:
        """What was measured, in words: repeats of a run have the same, whatever their seeds."""
        slots = f", ring of {self.summary.options.transport.ring_slots}" if self.staged else ""
        load = self.summary.options.load
        return f"{self.setup.words}; {load.words.replace(f' (seed {load.seed})', '')}{slots}"


def read_runs(paths: Sequence[Path]) -> list[Observed]:
    """Read every run at or below these folders, in order.

    Raises OutputError for a folder without runs or a run without records, RunFailed for one whose numbers do not count,
    IncomparableRuns where more differs than a model of the server can explain.
    """
    folders = [folder for path in paths for folder in _folders(path)]
    summaries = [load_summary(folder) for folder in folders]
    different = unlike(summaries, may_differ=MAY_DIFFER)
    if different:
        raise IncomparableRuns(
            f"the {len(summaries)} runs are of unlike machines, models or settings: {'; '.join(different)}; one plan"
            " needs runs that are alike in these, so name fewer of them"
        )
    return [_observe(folder, summary) for folder, summary in zip(folders, summaries, strict=True)]


def _folders(path: Path) -> list[Path]:
    found = sorted(each.parent for each in path.rglob(FILE_NAME))
    if not found:
        raise OutputError(
            f"{path}: no finished run there; name the folder of a run (it holds {FILE_NAME}) or of several"
        )
    return found


def _observe(folder: Path, summary: RunSummary) -> Observed:
    if not counts(summary) or summary.metrics.shed:
        reason = summary.error or f"{summary.metrics.errors} errors, {summary.metrics.unanswered} unanswered," + (
            f" {summary.metrics.wrong} wrong, {summary.metrics.shed} shed"
        )
        raise RunFailed(f"{folder}: the run does not count ({reason}); leave it out, or measure it again")
    path = folder / RECORDS
    if not path.is_file():
        raise OutputError(f"{path}: the run's requests are not there, and a plan is made from them; measure again")
    records = measured(read_records(path))
    records = records[records["status"] == STATUSES.index("ok")]
    if len(records) < 2:
        raise RunFailed(f"{folder}: {len(records)} answered requests, and at least 2 are needed; measure more")
    return observe(folder.name, summary, records)


def observe(name: str, summary: RunSummary, records: Records) -> Observed:
    """Take apart a run that counts."""
    staged = _staged(summary, records)
    setup = _setup(summary, records, staged=staged)
    return Observed(name, summary, records, lane_batches(records, setup) if staged else request_batches(records), setup)


def _staged(summary: RunSummary, records: Records) -> bool:
    ours = summary.options.target is None and summary.options.design.name == "lanes"
    return ours and bool((records["started_ns"] > 0).all() and (records["batch_rows"] > 0).all())


def _setup(summary: RunSummary, records: Records, *, staged: bool) -> Setup:
    options = summary.options
    rows = int(records["rows"].max())
    if not staged:
        most = _most_in_flight(records["issued_ns"], records["completed_ns"])
        return Setup(rows, BatchingConfig(buckets=(rows,)), lanes=most, depth=1)
    batching = BatchingConfig(buckets=options.lanes.buckets, max_queue_delay_us=options.lanes.max_queue_delay_us)
    padded = options.device_kind != "cpu" or options.model.compile
    return Setup(rows, batching, options.design.num_workers, options.lanes.depth, padded)


def lane_batches(records: Records, setup: Setup) -> Batches:
    """Return the batches of lanes. A batch's requests have its lane and its launch in common."""
    ordered = records[np.lexsort((records["started_ns"], records["worker"]))]
    lane, launched = ordered["worker"], ordered["started_ns"]
    first = np.r_[True, (np.diff(launched) != 0) | (np.diff(lane) != 0)]
    batches = ordered[first]
    previous = np.r_[0, batches["computed_ns"][:-1]]
    previous[np.r_[True, np.diff(batches["worker"]) != 0]] = 0
    start = np.maximum(batches["started_ns"], previous)
    waited = (start - batches["started_ns"]) / NS_PER_S
    sizes, which = np.unique(batches["batch_rows"], return_inverse=True)
    rows = np.array([setup.computed(int(size)) for size in sizes], dtype=np.int64)[which]
    with_next = (np.diff(batches["computed_ns"]) == 0) & (np.diff(batches["worker"]) == 0)
    sure = ~(np.r_[with_next, False] | np.r_[False, with_next])
    return _batches(start, batches["computed_ns"], rows, waited, sure)


def request_batches(records: Records) -> Batches:
    """Return every request as a batch."""
    count, rows = len(records), records["rows"].astype(np.int64)
    return _batches(records["issued_ns"], records["completed_ns"], rows, np.zeros(count), np.ones(count, dtype=bool))


def _batches(
    start: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    waited: Seconds,
    sure: npt.NDArray[np.bool_],
) -> Batches:
    return Batches(np.maximum(end - start, 1) / NS_PER_S, rows, waited, sure, start)


def _most_in_flight(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> int:
    order = np.argsort(np.concatenate([start, end]), kind="stable")
    return int(np.cumsum(np.repeat([1, -1], [len(start), len(end)])[order]).max())
