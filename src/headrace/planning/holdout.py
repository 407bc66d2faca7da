"""How wrong the model is: each measured configuration is predicted from all others, never from its own runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.clock import NS_PER_S
from headrace.planning.calibrate import Calibrated, calibrate
from headrace.planning.observe import Observed
from headrace.planning.simulate import Fitted, Simulated, simulate_closed, simulate_open

MOST_REQUESTS = 20_000  # of a run that are simulated
GUESSED = 2_000  # requests from which a closed loop's rate is found
THROUGHPUT_TARGET = 0.10
P99_TARGET = 0.20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration measured, and predicted from the others. Latency is from issue to answer."""

    cell: str
    runs: int
    throughput_samples_per_s: float  # median of its runs
    predicted_samples_per_s: float
    p50_s: float
    predicted_p50_s: float
    p99_s: float
    predicted_p99_s: float
    pauses_share: float  # of the time that its host stood still
    outside: str | None  # where the prediction goes beyond what the others measured

    @property
    def throughput_error(self) -> float:
        return self.predicted_samples_per_s / self.throughput_samples_per_s - 1

    @property
    def p50_error(self) -> float:
        return self.predicted_p50_s / self.p50_s - 1

    @property
    def p99_error(self) -> float:
        return self.predicted_p99_s / self.p99_s - 1

    @property
    def missed(self) -> tuple[str, ...]:
        """Which targets of accuracy were missed."""
        throughput = abs(self.throughput_error) > THROUGHPUT_TARGET
        p99 = abs(self.p99_error) > P99_TARGET
        return (*(["throughput"] if throughput else []), *(["p99"] if p99 else []))


def leave_one_out(runs: Sequence[Observed], seed: int, *, pauses: bool = True) -> list[Checked]:
    """Predict every configuration from the others; nothing where there is only one."""
    cells = list(dict.fromkeys(run.cell for run in runs))
    if len(cells) < 2:
        return []
    return [_check(cell, runs, seed, pauses=pauses) for cell in cells]


def _check(cell: str, runs: Sequence[Observed], seed: int, *, pauses: bool) -> Checked:
    held = [run for run in runs if run.cell == cell]
    model = calibrate([run for run in runs if run.cell != cell], pauses=pauses)
    own = calibrate(held)
    predicted = again(held[0], model, seed)
    latencies = [(run.records["completed_ns"] - run.records["issued_ns"]) / NS_PER_S for run in held]
    rows = held[0].setup.rows
    computed = int(np.median(held[0].batches.rows))
    running = float(np.median(held[0].batches.running(model.law.work_s.at)))
    return Checked(
        cell=cell,
        runs=len(held),
        throughput_samples_per_s=float(np.median([run.requests_per_s for run in held])) * rows,
        predicted_samples_per_s=predicted.samples_per_s,
        p50_s=float(np.median([np.percentile(each, 50) for each in latencies])),
        predicted_p50_s=float(np.percentile(predicted.latency_s, 50)),
        p99_s=float(np.median([np.percentile(each, 99) for each in latencies])),
        predicted_p99_s=float(np.percentile(predicted.latency_s, 99)),
        pauses_share=own.pauses.share,
        outside=model.law.outside(computed, running),
    )


def again(run: Observed, model: Calibrated, seed: int) -> Simulated:
    """Simulate what a run did: its closed loop, or its requests at the moments at which it issued them."""
    rows, count = run.setup.rows, min(len(run.records), MOST_REQUESTS)
    if run.concurrency is not None:
        rate = run.setup.lanes / model.law.at(rows, run.setup.lanes)
        fitted = Fitted(model, rows, rate, seed, closed=True)
        guess = simulate_closed(run.setup, fitted, min(count, GUESSED), run.concurrency)
        fitted = Fitted(model, rows, guess.samples_per_s / rows, seed, closed=True)
        return simulate_closed(run.setup, fitted, count, run.concurrency)
    issued = np.sort(run.records["issued_ns"])[:count]
    return simulate_open(run.setup, Fitted(model, rows, run.requests_per_s, seed), (issued - issued[0]) / NS_PER_S)
