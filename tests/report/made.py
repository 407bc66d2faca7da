"""Makes run folders without running anything: seeded records, and the summary that follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.bench import stats
from headrace.bench.record import PHASES, RECORD_DTYPE, STATUSES, Records, empty_records, write_records
from headrace.bench.summary import FILE_NAME, Limits, RunSummary, encode
from headrace.bench.telemetry import SCHEMA
from headrace.config import DesignConfig, InputConfig, LanesConfig, LoadConfig, ModelConfig, RunConfig, TransportConfig
from tests.study import summaries

STAMPS = ("issued_ns", "received_ns", "started_ns", "computed_ns", "responded_ns", "completed_ns")
BEGAN_NS = 7_000_000_000
LIMITS = Limits(
    bucket=4,
    row_bytes=1000,
    answer_bytes=40,
    forward_samples_per_s={1: 5000.0, 2: 8000.0},
    h2d_bytes_per_s=2e7,
    d2h_bytes_per_s=2e7,
    memcpy_bytes_per_s={1: 9e6},
)


def records(count: int = 1500, *, seed: int = 0, rate: float | None = 500.0, rows: int = 4) -> Records:
    """Return a first request and `count` measured ones, answered rightly; all due at once without a rate."""
    random = np.random.default_rng(seed)
    made = empty_records(count + 1)
    made["phase"] = PHASES.index("measured")
    made["phase"][0] = PHASES.index("first")
    made["rows"], made["batch_rows"] = rows, np.where(np.arange(count + 1) % 3, 2 * rows, rows)
    made["status"] = STATUSES.index("ok")
    made["worker"] = np.arange(count + 1) % 2
    gaps = random.exponential(1e9 / rate, count + 1) if rate else np.zeros(count + 1)
    at_ns = (BEGAN_NS + np.cumsum(gaps)).astype(np.int64)
    made["scheduled_ns"] = at_ns
    for name in STAMPS:
        at_ns = at_ns + random.lognormal(12, 1.2, count + 1).astype(np.int64)
        made[name] = at_ns
    return made


def options(batch_size: int = 4, load: LoadConfig | None = None, precision: str = "bf16") -> RunConfig:
    return RunConfig(
        device="cuda",
        model=ModelConfig(precision=precision),
        design=DesignConfig(name="lanes", num_workers=2),
        inputs=InputConfig(batch_size=batch_size),
        transport=TransportConfig(name="ring"),
        lanes=LanesConfig(buckets=(batch_size,)),
        load=load or LoadConfig(kind="poisson", rate=500.0, num_iters=1500),
    )


def summary(of: Records, config: RunConfig, **changes: object) -> RunSummary:
    metrics = stats.compute(of, config.load.bound_s)
    warm_up = metrics.warmup_latency_s or 0.0
    return replace(
        summaries.summary(),
        experiment=config.experiment,
        options=config,
        command=("headrace", "bench", "--title", "it's <b>"),
        metrics=metrics,
        warmup_parts_s={"weights": 0.25 * warm_up, "first forward": 0.75 * warm_up},
        limits=LIMITS,
        **changes,
    )


def write_run(folder: Path, of: Records, told: RunSummary) -> Path:
    """Write a run's folder, with telemetry every 100 ms, and return it."""
    folder.mkdir(parents=True)
    write_records(of, folder / "requests.parquet")
    (folder / FILE_NAME).write_bytes(encode(told))
    at_ns = np.arange(BEGAN_NS - 10**9, int(of["completed_ns"].max()) + 10**9, 10**8)
    columns = {name: [None] * len(at_ns) for name in SCHEMA.names}
    columns |= {"at_ns": at_ns.tolist(), "gpu_utilization_pct": np.linspace(0, 100, len(at_ns)).tolist()}
    columns["cpu_utilization_pct"] = [None, *[20.0] * (len(at_ns) - 1)]
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / "telemetry.parquet")
    return folder


def run(folder: Path, *, seed: int = 0, config: RunConfig | None = None, **changes: object) -> Path:
    """Write a good run and return its folder."""
    config = config or options()
    of = records(config.load.num_iters, seed=seed, rate=config.load.rate, rows=config.inputs.batch_size)
    return write_run(folder, of, summary(of, config, **changes))


def damaged(of: Records, status: str, count: int) -> Records:
    """Return the records with the last of them in another status."""
    changed = of.copy()
    changed["status"][-count:] = STATUSES.index(status)
    return changed


assert set(STAMPS) <= set(RECORD_DTYPE.names or ())
