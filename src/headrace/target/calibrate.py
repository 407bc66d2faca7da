"""What the harness itself is worth here: runs against a server of known law, and what they should have shown.

The truth is computed, not measured: the law's queue over the planned arrivals, as a client that is never late and a
network that takes no time would see it. So an error holds all that the harness and the machine add.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace import __version__
from headrace.bench import arrivals, calibration, environment, validity
from headrace.bench.calibration import Calibration, Ceiling, Recovered, Slip
from headrace.bench.record import PHASES, STATUSES
from headrace.clock import NS_PER_S
from headrace.config import InputConfig, LoadConfig, RunConfig, TargetConfig
from headrace.errors import RunFailed
from headrace.target.law import DRAWS, Law, Queue, Transport, parse_law
from headrace.target.run import Files, Outcome, Watcher, run_target

PAYLOADS = (1_024, 750_000, 24_000_000)  # bytes: a few numbers, a photograph, 32 of them
CEILING_CONCURRENCY = 16  # of each generator
LARGE = 1_000_000  # bytes; of larger payloads few are kept and few are in flight

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trial:
    """A law, and the Poisson rate that it is tried at."""

    law: str
    rate: float
    payload_bytes: int = 1_024


def trials(duration_s: float) -> tuple[Trial, ...]:
    """Return what is tried: little load and much of either law, a photograph, and a stall of a fifth of the time."""
    stall = f"stall={duration_s / 5:g}s&stall_at={duration_s / 5:g}s"
    return (
        Trial("null://fixed?service=5ms", 100),
        Trial("null://fixed?service=5ms", 160),
        Trial("null://exponential?mean=5ms&seed=1", 100),
        Trial("null://exponential?mean=5ms&seed=1", 160),
        Trial("null://fixed?service=5ms", 100, 750_000),
        Trial(f"null://fixed?service=1ms&{stall}", 200),
    )


def calibrate(generators: int, duration_s: float, watcher: Watcher, transport: Transport = "http") -> Calibration:
    """Measure every trial and ceiling, each for `duration_s`. Raises RunFailed where one does not count."""
    over = "" if transport == "http" else f"&transport={transport}"
    recovered, delays = [], []
    for trial in trials(duration_s):
        watcher.stage(f"{trial.law} at {trial.rate:g} requests/s of {trial.payload_bytes:,} bytes")
        load = LoadConfig(kind="poisson", rate=trial.rate, duration_s=duration_s)
        outcome = _measure(_with_bytes(trial.law, trial.payload_bytes) + over, load, generators, watcher)
        recovered.append(_recovered(trial, load, outcome))
        measured = outcome.records[outcome.records["phase"] == PHASES.index("measured")]
        delays.append(measured["issued_ns"] - measured["scheduled_ns"])
    ceilings = []
    for payload_bytes in PAYLOADS:
        watcher.stage(f"ceiling for {payload_bytes:,} bytes")
        law = _with_bytes("null://fixed?service=0us", payload_bytes) + over
        ceilings.append(_ceiling(law, payload_bytes, duration_s, generators, watcher))
    late_s = np.concatenate(delays).astype(np.float64) / NS_PER_S
    p50, p90, p99 = np.percentile(late_s, [50, 90, 99]).tolist()
    machine = environment.collect(None)
    return Calibration(
        schema_version=calibration.SCHEMA_VERSION,
        machine=calibration.machine_key(machine.cpu_model, machine.cpu_count),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        headrace=__version__,
        generators=generators,
        recovered=tuple(recovered),
        slip=Slip(p50=p50, p90=p90, p99=p99, max=float(late_s.max())),
        ceilings=tuple(ceilings),
        transport=transport,
    )


def true_response_ns(law: Law, offsets: Offsets) -> Offsets:
    """Return the response times that the law gives to requests which arrive at these moments, all of them answered."""
    queue, services = Queue(law), law.service_times_ns()
    due = [queue.due_ns(at, services[number % DRAWS]) for number, at in enumerate(offsets.tolist())]
    return np.asarray(due, dtype=np.int64) - offsets


def _with_bytes(law: str, payload_bytes: int) -> str:
    return f"{law}{'&' if '?' in law else '?'}bytes={payload_bytes}"


def _measure(law: str, load: LoadConfig, generators: int, watcher: Watcher) -> Outcome:
    small = f"bytes={PAYLOADS[0]}" in law
    target = TargetConfig(url=law, generators=generators, distinct=16 if small else 2)
    config = RunConfig(inputs=InputConfig(kind="random", batch_size=1), load=load, target=target)
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        files = Files(output_dir=Path(folder) / "run", calibration=Path(folder) / "none.json")
        outcome = run_target(config, files, (), watcher)
    if outcome.summary.error is not None:
        raise RunFailed(f"{law}: {outcome.summary.error}")
    return outcome


def _recovered(trial: Trial, load: LoadConfig, outcome: Outcome) -> Recovered:
    offsets = arrivals.planned(load)
    assert offsets is not None
    records = outcome.records
    measured = records[(records["phase"] == PHASES.index("measured")) & (records["status"] == STATUSES.index("ok"))]
    seen_ns = measured["completed_ns"] - measured["scheduled_ns"]
    truth_ns = true_response_ns(parse_law(trial.law), offsets)
    true_p50, true_p99 = np.percentile(truth_ns, [50, 99]).tolist()
    seen_p50, seen_p99 = np.percentile(seen_ns, [50, 99]).tolist()
    true_window_ns = float((offsets + truth_ns).max() - offsets[0])
    seen_window_ns = float(measured["completed_ns"].max() - measured["scheduled_ns"].min())
    return Recovered(
        law=trial.law,
        rate=trial.rate,
        payload_bytes=trial.payload_bytes,
        requests=len(offsets),
        true_p50_s=true_p50 / NS_PER_S,
        true_p99_s=true_p99 / NS_PER_S,
        p50_error=seen_p50 / true_p50 - 1,
        p99_error=seen_p99 / true_p99 - 1,
        throughput_error=true_window_ns / seen_window_ns - 1,
    )


def _ceiling(law: str, payload_bytes: int, duration_s: float, generators: int, watcher: Watcher) -> Ceiling:
    many = generators * (CEILING_CONCURRENCY if payload_bytes < LARGE else 1)
    full = _measure(law, LoadConfig(kind="closed", concurrency=many, duration_s=duration_s), generators, watcher)
    alone = _measure(law, LoadConfig(kind="closed", concurrency=1, duration_s=duration_s), 1, watcher)
    rate, service = validity.requests_per_s(full.summary.metrics), alone.summary.metrics.service_time
    assert rate is not None
    assert service is not None
    return Ceiling(payload_bytes=payload_bytes, requests_per_s=rate, p50_s=service.p50, p99_s=service.p99)
