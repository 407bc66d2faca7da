"""Queues of known law that answer a search in place of runs: Lindley's recursion over planned arrivals, in no time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from headrace.bench import arrivals, stats
from headrace.bench.record import STATUSES, empty_records
from headrace.bench.summary import SCHEMA_VERSION, Activity, RunSummary
from headrace.clock import NS_PER_S
from headrace.config import InputConfig, LoadConfig, RunConfig, TargetConfig
from headrace.search.capacity import Budget, Search, SearchConfig
from headrace.search.capacity_report import capacity_report
from headrace.search.holds import Bound
from headrace.search.trial import Trial, of_records
from tests.bench.test_environment import BASE

CONNECTIONS = 1024


class Clock:
    """Stands still but for what a fake run says that it took."""

    def __init__(self):
        self.ns = 1

    def __call__(self):
        return self.ns


class Told:
    """What a search said."""

    def __init__(self):
        self.lines = []

    def step(self, text, left_s):
        self.lines.append(text)

    def found(self, text):
        self.lines.append(text)


@dataclass
class Queue:
    """One server in order of arrival. `late_s`: how long the client stops sending once a second."""

    mean_s: float
    exponential: bool = False
    seed: int = 0
    late_s: float = 0.0
    refuses: int = 0  # of each run's requests, the first so many
    client_rate: float = math.inf  # requests/s that the client can send
    clock: Clock = field(default_factory=Clock)
    overhead_s: float = 2.0
    loads: list = field(default_factory=list)

    def __call__(self, name: str, load: LoadConfig) -> Trial:
        self.loads.append(load)
        self.clock.ns += int((load.duration_s + self.overhead_s) * NS_PER_S)
        rng = np.random.default_rng([self.seed, len(self.loads)])
        records = self._closed(load, rng) if load.kind == "closed" else self._open(load, rng)
        records["phase"] = 2
        records["rows"] = 1
        records["status"] = STATUSES.index("ok")
        records["status"][: self.refuses] = STATUSES.index("shed")
        return of_records(name, summary(load), records, bound_s=load.bound_s or 1.0)

    def services(self, count, rng):
        mean_ns = self.mean_s * NS_PER_S
        return rng.exponential(mean_ns, count) if self.exponential else np.full(count, mean_ns)

    def _closed(self, load, rng):
        ends = np.cumsum(self.services(max(1, int(load.duration_s / self.mean_s)), rng))
        records = empty_records(len(ends))
        begins = np.concatenate([np.zeros(load.concurrency), ends])[: len(ends)]
        return stamped(records, begins, begins, ends)

    def _open(self, load, rng):
        offsets = arrivals.planned(load).astype(np.float64)
        issued = offsets.copy()
        if self.late_s:
            late = offsets % NS_PER_S < self.late_s * NS_PER_S
            issued[late] = (offsets[late] // NS_PER_S + self.late_s) * NS_PER_S
        if self.client_rate < math.inf:
            issued = lindley(issued, np.full(len(issued), NS_PER_S / self.client_rate))
        return stamped(empty_records(len(offsets)), offsets, issued, lindley(issued, self.services(len(issued), rng)))


def lindley(arrived, services):
    """Return when each is done: W(n+1) = max(0, W(n) + S(n) - T(n)), summed up."""
    before = np.cumsum(services) - services
    return before + services + np.maximum.accumulate(arrived - before)


def stamped(records, scheduled, issued, completed):
    for name, values in (("scheduled_ns", scheduled), ("issued_ns", issued), ("completed_ns", completed)):
        records[name] = np.rint(values).astype(np.int64) + 1
    return records


def summary(load: LoadConfig) -> RunSummary:
    options = RunConfig(
        inputs=InputConfig(batch_size=1),
        load=load,
        target=TargetConfig(url="http://127.0.0.1:1", model="m", connections=CONNECTIONS),
    )
    return RunSummary(
        schema_version=SCHEMA_VERSION,
        experiment="simulated",
        started_at="",
        options=options,
        command=(),
        metrics=stats.compute(empty_records(0)),
        warmup_parts_s={},
        workers_warmed=0,
        activity=Activity(),
        answers=None,
        environment=BASE,
        torch=None,
    )


def searched(queue: Queue, **options):
    """Search, and return the report."""
    p99_s, allow_shed = options.pop("p99_s"), options.pop("allow_shed", 0.0)
    config = SearchConfig(bound=Bound(p99_s=p99_s, allow_shed=allow_shed), **options)
    trials = Search(config, queue, Told(), Budget(config.time_s, queue.clock)).run()
    return capacity_report("simulated", config, trials)


def mm1_rate(mean_s: float, p99_s: float) -> float:
    """Return the rate at which p99 of an M/M/1 queue is so: its response time is exponential of rate mu - lambda."""
    return 1 / mean_s + math.log(0.01) / p99_s


def md1_rate(mean_s: float, p99_s: float) -> float:
    """Return the rate at which p99 of an M/D/1 queue is so, by bisection on Erlang's series.

    Source: A. K. Erlang (1909): P(wait <= t) = (1 - rho) sum over k <= t/D of (rho (k - t/D))^k / k! e^(rho (t/D - k)).
    """

    def within(rho: float) -> float:
        t = p99_s / mean_s - 1
        terms = ((rho * (k - t)) ** k / math.factorial(k) * math.exp(rho * (t - k)) for k in range(int(t) + 1))
        return (1 - rho) * math.fsum(terms)

    low, high = 0.01, 0.999
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) >= 0.99 else (low, middle)
    return low / mean_s


def trial_of(queue: Queue, rate: float, duration_s: float) -> Trial:
    """Return an open-loop run of a queue."""
    return queue("000-final-x", LoadConfig(kind="poisson", rate=rate, duration_s=duration_s))
