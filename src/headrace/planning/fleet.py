"""From one engine to a fleet: the setup that does most within the bound, and how many of it a rate needs.

Requests are split over GPUs at random, so each sees Poisson arrivals of its share; a balancer that knows which GPU is
free does better. So one GPU's share is simulated, however large the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace.errors import InvalidOption
from headrace.pipeline.batch import BatchingConfig
from headrace.planning.calibrate import Calibrated
from headrace.planning.observe import Setup
from headrace.planning.simulate import Fitted, Simulated, poisson, simulate_open

# Of a simulation, while searching and where its numbers are told: so long that pauses are no chance, within reason.
SEARCHED_S, SEARCHED = 1.0, (3_000, 30_000)  # requests at least and at most
FINAL_S, FINAL = 3.0, (8_000, 100_000)
STEPS = 7  # of the bisection of a rate
HIGHEST = 0.9  # of what an engine does at most: the model may be wrong by a tenth
QUIET = 0.01  # of what an engine does at most: requests that hardly ever meet
BACK_OFF = 0.97
DELAYS = (1 / 8, 1 / 4)  # of the bound
ECDF = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked for."""

    rate: float  # requests/s
    bound_s: float  # p99 must be within
    rates: tuple[float, ...] = ()  # further ones, for the table
    gpus_per_node: int = 8
    gpu_hour_cost: float | None = None
    network_bits_per_s: float | None = None  # of a node, each way
    proxy_rate: float | None = None  # requests/s of one
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Predicted, in seconds, from issue to answer."""

    p50: float
    p90: float
    p99: float
    ecdf: dict[str, float]  # percentile -> seconds

    @classmethod
    def of(cls, simulated: Simulated) -> Latency:
        values = np.percentile(simulated.latency_s, ECDF)
        by = {f"{at:g}": float(value) for at, value in zip(ECDF, values, strict=True)}
        return cls(p50=by["50"], p90=by["90"], p99=by["99"], ecdf=by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setup and the largest rate at which it keeps the bound."""

    setup: Setup
    requests_per_s: float  # of one GPU
    most_requests_per_s: float  # with full batches all the time
    latency: Latency
    outside: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What one rate needs."""

    rate: float
    gpus: int
    nodes: int
    proxies: int | None
    bound_by: str  # GPUs, or network
    latency: Latency
    degraded: Latency | None  # with one node less; None: what is left is overloaded, or nothing is left
    gpus_with_spare: int  # that keep the bound with one node less
    network_share: float | None  # of a node's network, the direction that is fuller
    gpu_hours_per_million: float
    cost_per_million: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Of a request, both ways; None: the runs do not say."""

    sent: float | None
    answered: float | None

    @property
    def fuller(self) -> float | None:
        known = [each for each in (self.sent, self.answered) if each is not None]
        return max(known) if known else None


def setups(buckets: Sequence[int], rows: int, lanes: Sequence[int], depth: int, *, padded: bool = True) -> list[Setup]:
    """Return what is tried: each measured bucket, ascending, as the largest, with each number of lanes."""
    usable = [bucket for bucket in buckets if bucket >= rows] or [rows]
    sets = [tuple(dict.fromkeys((rows, *usable[: number + 1]))) for number in range(len(usable))]
    return [
        Setup(rows=rows, batching=BatchingConfig(buckets=buckets), lanes=count, depth=depth, padded=padded)
        for buckets in dict.fromkeys(sets)
        for count in lanes
    ]


def most_requests_per_s(model: Calibrated, setup: Setup) -> float:
    """Return what an engine answers with full batches on all lanes and the pauses that it has."""
    count = setup.batching.max_batch_size // setup.rows
    batch_s = model.law.at(setup.batching.max_batch_size, setup.lanes) * model.mean_noise(setup.lanes)
    rate = setup.lanes * count / batch_s
    return rate * (1 - min(model.pauses.share, 0.9))


def latency_at(model: Calibrated, setup: Setup, rate: float, seed: int, *, searching: bool = False) -> Latency | None:
    """Simulate one GPU under Poisson arrivals; None where it answers fewer than come."""
    if rate > most_requests_per_s(model, setup):
        return None
    lasting_s, (least, most) = (SEARCHED_S, SEARCHED) if searching else (FINAL_S, FINAL)
    count = min(max(least, round(rate * lasting_s)), most)
    service = Fitted(model, setup.rows, rate, seed)
    return Latency.of(simulate_open(setup, service, poisson(rate, count, seed)))


def choose(model: Calibrated, tried: Sequence[Setup], ask: Ask) -> list[Choice]:
    """Return the best setup first, and for each other number of rows of the largest bucket the best with it.

    Raises InvalidOption where none keeps the bound even when it is idle.
    """
    by_bucket: dict[int, Choice] = {}
    smallest_s = math.inf
    for setup in sorted(tried, key=lambda each: -most_requests_per_s(model, each)):
        quiet = latency_at(model, setup, QUIET * most_requests_per_s(model, setup), ask.seed, searching=True)
        assert quiet is not None
        smallest_s = min(smallest_s, quiet.p99)
        best = by_bucket.get(setup.batching.max_batch_size)
        if quiet.p99 <= ask.bound_s and (found := _largest(model, setup, ask, best)):
            by_bucket[setup.batching.max_batch_size] = found
    if not by_bucket:
        raise InvalidOption(
            f"--p99 {ask.bound_s * 1e3:g} ms: no number of GPUs answers within it: a request that has a GPU to itself"
            f" has a p99 of {smallest_s * 1e3:.3g} ms with the best of {len(tried)} setups; allow more, or serve a"
            " faster model"
        )
    ranked = sorted(by_bucket.values(), key=lambda each: -each.requests_per_s)
    delayed = [_delayed(ranked[0].setup, share * ask.bound_s) for share in DELAYS]
    better = [found for setup in delayed if (found := _largest(model, setup, ask, ranked[0]))]
    best = max(better, key=lambda each: each.requests_per_s, default=ranked[0])
    return [best, *ranked[1:]]


def _delayed(setup: Setup, delay_s: float) -> Setup:
    return replace(setup, batching=replace(setup.batching, max_queue_delay_us=round(delay_s * 1e6)))


def _largest(model: Calibrated, setup: Setup, ask: Ask, best: Choice | None) -> Choice | None:
    """Bisect the rate; None where it keeps the bound at no higher rate than `best` does."""
    most = most_requests_per_s(model, setup)

    def keeps(rate: float, *, searching: bool = True) -> Latency | None:
        latency = latency_at(model, setup, rate, ask.seed, searching=searching)
        return latency if latency and latency.p99 <= ask.bound_s else None

    low, high = (best.requests_per_s if best else QUIET * most), HIGHEST * most
    if low >= high or not keeps(low):
        return None
    if keeps(high):
        low = high
    else:
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
    while not (latency := keeps(low, searching=False)):
        low *= BACK_OFF
    if best and low <= best.requests_per_s:
        return None
    return Choice(
        setup=setup,
        requests_per_s=low,
        most_requests_per_s=most,
        latency=latency,
        outside=model.law.outside(setup.batching.max_batch_size, setup.lanes),
    )


def fleet(model: Calibrated, choice: Choice, rate: float, ask: Ask, size: Bytes) -> Fleet:
    """Size a fleet of such GPUs for a rate."""
    per_node = ask.gpus_per_node
    gpus = max(1, math.ceil(rate / choice.requests_per_s))
    nodes, bound_by = math.ceil(gpus / per_node), "GPUs"
    node_rate = _network_requests_per_s(ask, size)
    if node_rate is not None and nodes * node_rate < rate:
        nodes, bound_by = math.ceil(rate / node_rate), "network"
        gpus = max(gpus, nodes * per_node)
    latency = latency_at(model, choice.setup, rate / gpus, ask.seed)
    assert latency is not None  # its share is at most what the choice has been found to do
    left = gpus - per_node
    carried = node_rate is None or (nodes - 1) * node_rate >= rate
    hours = gpus / 3600 / rate * 1e6
    return Fleet(
        rate=rate,
        gpus=gpus,
        nodes=nodes,
        proxies=None if ask.proxy_rate is None else math.ceil(rate / ask.proxy_rate),
        bound_by=bound_by,
        latency=latency,
        degraded=latency_at(model, choice.setup, rate / left, ask.seed) if left > 0 and carried else None,
        gpus_with_spare=gpus + per_node,
        network_share=None if node_rate is None else rate / nodes / node_rate,
        gpu_hours_per_million=hours,
        cost_per_million=None if ask.gpu_hour_cost is None else hours * ask.gpu_hour_cost,
    )


def _network_requests_per_s(ask: Ask, size: Bytes) -> float | None:
    if ask.network_bits_per_s is None or size.fuller is None:
        return None
    return ask.network_bits_per_s / BITS / size.fuller


def limits(choice: Choice, ask: Ask, size: Bytes) -> dict[str, float]:
    """Return the requests/s of each part, the smallest first: that is the limit that a growing rate meets first."""
    found = {f"{ask.gpus_per_node} GPUs of a node": choice.requests_per_s * ask.gpus_per_node}
    network = _network_requests_per_s(ask, size)
    if network is not None:
        found["network of a node"] = network
    if ask.proxy_rate is not None:
        found["one proxy"] = ask.proxy_rate
    return dict(sorted(found.items(), key=lambda each: each[1]))
