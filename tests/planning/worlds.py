"""Worlds of known law for the simulation, and runs made up of stamps."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace.bench.record import PHASES, STATUSES, empty_records, write_records
from headrace.bench.stats import compute
from headrace.bench.summary import encode, load_summary
from headrace.pipeline.batch import BatchingConfig
from headrace.planning.observe import Setup

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H100 = RESULTS / "nvidia-h100-80gb" / "lanes" / "runs"


class World:
    """`seconds(rows, running)` of a batch, times what `noise` draws; no transport unless it is given."""

    def __init__(self, seconds, noise=lambda: 1.0, pauses=(), before=0.0, idle=0.0):
        self._seconds, self._noise, self._pauses, self._before, self._idle = seconds, noise, list(pauses), before, idle

    def before(self):
        return self._before

    def after(self):
        return 0.0

    def again(self):
        return 0.0

    def noise(self, running):
        return self._noise()

    def work_s(self, rows):
        return 1.0

    def at(self, rows, running):
        return self._seconds(rows, running)

    def idle_s(self, rows):
        return self._idle

    def next_pause(self):
        return self._pauses.pop(0) if self._pauses else None


def setup(rows=1, buckets=(1,), lanes=1, depth=1, delay_us=0):
    return Setup(rows, BatchingConfig(buckets=buckets, max_queue_delay_us=delay_us), lanes, depth)


def exponential(seed):
    random = np.random.default_rng(seed)
    return lambda: float(random.exponential())


def made_records(issued_s, completed_s, rows=1):
    """Requests that were computed one by one on one lane, each from its issue to its answer."""
    records = empty_records(len(issued_s))
    records["phase"] = PHASES.index("measured")
    records["status"] = STATUSES.index("ok")
    records["rows"] = records["batch_rows"] = rows
    issued, completed = (10**9 + (np.asarray(each) * 1e9).astype(np.int64) for each in (issued_s, completed_s))
    for name in ("scheduled_ns", "issued_ns", "received_ns", "started_ns"):
        records[name] = issued
    for name in ("computed_ns", "responded_ns", "completed_ns"):
        records[name] = completed
    return records


def summary_of(records, *, rows=1, buckets=None, lanes=1, depth=1, concurrency=1, **changes):
    """Return the summary of such a run: a committed one's, with other options and metrics."""
    base = load_summary(H100 / "bf16-b8.0")
    options = base.options
    changed = replace(
        options,
        inputs=replace(options.inputs, batch_size=rows),
        lanes=replace(options.lanes, buckets=buckets or (rows,), depth=depth),
        design=replace(options.design, num_workers=lanes),
        load=replace(options.load, kind="closed", concurrency=concurrency, num_iters=len(records)),
    )
    return replace(base, options=replace(changed, **changes), metrics=compute(records), limits=None)


def write_run(folder, records, summary):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_bytes(encode(summary))
    write_records(records, folder / "requests.parquet")
    return folder
