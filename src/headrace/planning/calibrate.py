"""Fits the model of an engine to runs: how long batches run, what the transport adds, how often the host pauses.

A pause is a time in which the host does nothing for us: the process or its virtual CPU is not run. It shows as a batch
that ended long after it should have, and as a request that lay in the transport for long. Such times are taken out of
the distributions of batches and transport, and come back as pauses of the measured number and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from headrace.clock import NS_PER_S
from headrace.planning.law import Curve, ServiceLaw
from headrace.planning.observe import Observed, Seconds

LEAST = 20  # batches that a level of the law is taken from
LEAST_SHARE = 0.1  # of a run's batches
STEEPNESS = 2.0  # runs whose requests differ by a factor of e in rows or rate weigh e^2 times less
MIXED = 20_000  # values that stand for a mix of distributions
ADDED_UP = 8  # batches that follow each other on a lane
LATE_TIMES = 3.0  # times the median: later than that is a pause
LATE_S = 0.5e-3  # and by at least so much
LEVELS_PER_DOUBLING = 2


@dataclass(frozen=True, slots=True)
class Pauses:
    """Times in which the host stood still."""

    per_s: float
    lengths: Seconds  # may be empty

    @property
    def share(self) -> float:
        """Of all time."""
        return self.per_s * float(self.lengths.mean()) if len(self.lengths) else 0.0


@dataclass(frozen=True, slots=True)
class Transport:
    """Seconds of requests in alike runs: from issue until the engine has it, and from its end until the answer."""

    rows: int
    requests_per_s: float
    before: Seconds
    after: Seconds
    again: Seconds  # from an answer until the client has sent the next request, in a closed loop


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The model of an engine, fitted."""

    law: ServiceLaw
    idle_s: tuple[float, ...]  # by the law's rows: what a batch takes longer that finds its lane idle
    noise: Seconds  # a batch's time over the law's; median 1
    transports: tuple[Transport, ...]
    pauses: Pauses  # of all runs together: they are the machine's

    def alike(self, rows: int, requests_per_s: float, random: np.random.Generator) -> Transport:
        """Mix those of the runs, the more of each the more alike its requests were in rows and rate.

        Each request costs the host time, so their rate counts as their rows do. A mix changes little by little with the
        rate, where the most alike alone would change at once.
        """
        weights = self._weights(rows, requests_per_s)
        return Transport(
            rows=rows,
            requests_per_s=requests_per_s,
            before=_mixed([each.before for each in self.transports], weights, random),
            after=_mixed([each.after for each in self.transports], weights, random),
            again=_mixed([each.again for each in self.transports], weights, random),
        )

    def _weights(self, rows: int, requests_per_s: float) -> Seconds:
        distances = np.array(
            [abs(log(each.rows / rows)) + abs(log(each.requests_per_s / requests_per_s)) for each in self.transports]
        )
        weights = np.exp(-STEEPNESS * (distances - distances.min()))
        return np.asarray(weights / weights.sum())

    def idle(self, rows: int) -> float:
        return float(np.interp(rows, self.law.rows, self.idle_s))


def _mixed(values: Sequence[Seconds], weights: Seconds, random: np.random.Generator) -> Seconds:
    """Draw from each as many as its weight says; the weights sum to 1."""
    counts = np.rint(weights * MIXED).astype(int)
    return np.concatenate([random.choice(each, count) for each, count in zip(values, counts, strict=True) if count])


def calibrate(runs: Sequence[Observed], *, pauses: bool = True) -> Calibrated:
    """Fit to at least one run. Without `pauses` the host never stands still."""
    fitted = [_fit_bucket(rows, runs) for rows in sorted({int(row) for run in runs for row in run.batches.buckets})]
    law = ServiceLaw(tuple(each.rows for each in fitted), tuple(each.curve for each in fitted))
    idle = tuple(each.idle_s for each in fitted)
    found = [_pauses_of(run, law, idle) if pauses else np.empty(0) for run in runs]
    return Calibrated(
        law=law,
        idle_s=idle,
        noise=_noise(runs, law, idle),
        transports=tuple(_transports(runs)),
        pauses=_together(runs, found),
    )


@dataclass(frozen=True, slots=True)
class _Bucket:
    rows: int
    curve: Curve
    idle_s: float


Points = dict[int, tuple[float, float]]  # by level: mean number running, seconds


def _fit_bucket(rows: int, runs: Sequence[Observed]) -> _Bucket:
    """Join what batches behind others show, what those on idle lanes show, and the shape of the model alone."""
    behind = _points(runs, rows, lambda run: _usual(run) & run.batches.behind)
    idle = _points(runs, rows, lambda run: _usual(run) & ~run.batches.behind)
    # Told apart where a batch has the device to itself: with others beside it, their beginnings count too.
    extra = max(0.0, idle[0][1] - behind[0][1]) if behind.keys() & idle.keys() & {0} else 0.0
    started = {level: (at, seconds - extra) for level, (at, seconds) in idle.items()}
    points = _filled_up((started | behind) or _any_points(runs, rows), _alone(runs, rows))
    ordered = sorted(points.values())
    levels = tuple(at for at, _ in ordered)
    # More beside it never make a batch faster.
    seconds = tuple(np.maximum.accumulate([seconds for _, seconds in ordered]).tolist())
    return _Bucket(rows, Curve(levels, seconds), extra)


def _level(running: Seconds) -> Seconds:
    return np.asarray(np.rint(np.log2(running) * LEVELS_PER_DOUBLING))


def _points(runs: Iterable[Observed], rows: int, chosen: Callable[[Observed], npt.NDArray[np.bool_]]) -> Points:
    """Return for each level of enough batches the median: pauses make some late, and those told with them early."""
    running, seconds = _of_bucket(runs, rows, chosen)
    levels = _level(running)
    points: Points = {}
    for level in np.unique(levels):
        here = levels == level
        if here.sum() >= LEAST:
            points[int(level)] = (float(np.median(running[here])), float(np.median(seconds[here])))
    return points


def _any_points(runs: Iterable[Observed], rows: int) -> Points:
    """Return one point of all batches, however few."""
    running, seconds = _of_bucket(runs, rows, lambda run: np.ones(len(run.batches.seconds), dtype=bool))
    return {0: (float(np.median(running)), float(np.median(seconds)))}


def _of_bucket(
    runs: Iterable[Observed], rows: int, chosen: Callable[[Observed], npt.NDArray[np.bool_]]
) -> tuple[Seconds, Seconds]:
    parts = [(run.batches, chosen(run) & (run.batches.buckets == rows)) for run in runs]
    running = np.concatenate([batches.running[here] for batches, here in parts])
    return running, np.concatenate([batches.seconds[here] for batches, here in parts])


def _usual(run: Observed) -> npt.NDArray[np.bool_]:
    """Leave out what says little of the device.

    Batches are told in the order of their launch, and after a pause several at once: those that ended together, and
    those that ran beside more or fewer others than is usual in the run, were mostly told late.
    """
    _, which, counts = np.unique(_level(run.batches.running), return_inverse=True, return_counts=True)
    return np.asarray(run.batches.sure & (counts[which] >= LEAST_SHARE * len(which)))


def _latest(usual_s: float) -> float:
    return max(LATE_TIMES * usual_s, usual_s + LATE_S)


def _alone(runs: Iterable[Observed], rows: int) -> Points:
    """Return what the runs' own limits say of the model alone, without copies and answers."""
    found: dict[int, list[float]] = {}
    for run in runs:
        limits = run.summary.limits
        if limits is not None and limits.bucket == rows:
            for streams, rate in limits.forward_samples_per_s.items():
                found.setdefault(streams, []).append(streams * rows / rate)
    at = {streams: int(_level(np.array([float(streams)]))[0]) for streams in found}
    return {at[streams]: (float(streams), float(np.mean(seconds))) for streams, seconds in found.items()}


def _filled_up(points: Points, alone: Points) -> Points:
    """Add the levels that served batches do not show, in the proportion that they have at the nearest level."""
    shared = points.keys() & alone.keys()
    if not shared:
        return points
    curve = Curve(*(tuple(each) for each in zip(*sorted(alone.values()), strict=True)))
    filled = dict(points)
    for level in alone.keys() - points.keys():
        near = min(shared, key=lambda each: abs(each - level))
        at, seconds = points[near]
        filled[level] = (alone[level][0], alone[level][1] * seconds / curve.at(at))
    return filled


def expected_s(run: Observed, law: ServiceLaw, idle: Sequence[float]) -> Seconds:
    """Return what the law says of each of a run's batches."""
    batches = run.batches
    times = np.array(
        [law.at(rows, k) for rows, k in zip(batches.buckets.tolist(), batches.running.tolist(), strict=True)]
    )
    return times + np.where(batches.behind, 0.0, np.interp(batches.buckets, law.rows, idle))


def _noise(runs: Sequence[Observed], law: ServiceLaw, idle: Sequence[float]) -> Seconds:
    factors = []
    for run in runs:
        expected = expected_s(run, law, idle)
        on_time = run.batches.seconds <= np.maximum(LATE_TIMES * expected, expected + LATE_S)
        own = (run.batches.seconds / expected)[on_time]
        if len(own):
            # What a run differs from the law by is the law's error, not noise.
            factors.append(1 + (own / np.median(own) - 1) * _lasting(own))
    return np.concatenate(factors) if factors else np.ones(1)


def _lasting(factors: Seconds) -> float:
    """Return the share of the noise that stays when batches that follow each other are added up.

    A batch that is seen late makes the next one on its lane seem short; that is no noise of the device.
    """
    groups = factors[: len(factors) // ADDED_UP * ADDED_UP].reshape(-1, ADDED_UP)
    if len(groups) < 2 or not factors.std():
        return 1.0
    return min(1.0, float(groups.mean(axis=1).std() * np.sqrt(ADDED_UP) / factors.std()))


def _transports(runs: Sequence[Observed]) -> Iterable[Transport]:
    for cell in sorted({run.cell for run in runs}):
        alike = [run for run in runs if run.cell == cell]
        rate = float(np.mean([run.requests_per_s for run in alike]))
        rows, staged = alike[0].setup.rows, [run.records for run in alike if run.staged]
        again = np.concatenate([_again(run) for run in alike])
        if not staged:  # all is in the batches' own times
            yield Transport(rows, rate, np.zeros(1), np.zeros(1), again)
            continue
        before = np.concatenate([records["received_ns"] - records["issued_ns"] for records in staged]) / NS_PER_S
        after = np.concatenate([records["completed_ns"] - records["computed_ns"] for records in staged]) / NS_PER_S
        yield Transport(rows, rate, before[before <= _latest(float(np.median(before)))], after, again)


def _again(run: Observed) -> Seconds:
    """The n-th answer lets the client send the request that is n + `concurrency` in order."""
    concurrency = run.concurrency
    if concurrency is None or concurrency >= len(run.records):
        return np.zeros(1)
    issued, completed = np.sort(run.records["issued_ns"]), np.sort(run.records["completed_ns"])
    gaps = np.maximum(issued[concurrency:] - completed[: len(issued) - concurrency], 0) / NS_PER_S
    return np.asarray(gaps[gaps <= _latest(float(np.median(gaps)))])


def _together(runs: Sequence[Observed], pauses: Sequence[Seconds]) -> Pauses:
    return Pauses(sum(map(len, pauses)) / sum(run.window_s for run in runs), np.concatenate(pauses))


def _pauses_of(run: Observed, law: ServiceLaw, idle: Sequence[float]) -> Seconds:
    """Return the lengths of a run's pauses: where its late batches and late requests overlap, they are of one."""
    batches = run.batches
    expected = expected_s(run, law, idle)
    late = batches.seconds > np.maximum(LATE_TIMES * expected, expected + LATE_S)
    end = batches.start_ns / NS_PER_S + batches.seconds
    begins, ends = [(end - batches.seconds + expected)[late]], [end[late]]
    if run.staged:
        issued, received = run.records["issued_ns"] / NS_PER_S, run.records["received_ns"] / NS_PER_S
        usual = float(np.median(received - issued))
        lay = received - issued > _latest(usual)
        begins.append(issued[lay] + usual)
        ends.append(received[lay])
    return _merged(np.concatenate(begins), np.concatenate(ends))


def _merged(begins: Seconds, ends: Seconds) -> Seconds:
    """Return the lengths of the intervals' union, each connected part of it one."""
    if not len(begins):
        return np.empty(0)
    order = np.argsort(begins)
    begins, reached = begins[order], np.maximum.accumulate(ends[order])
    new = np.r_[True, begins[1:] > reached[:-1]]
    last = np.r_[np.flatnonzero(new)[1:] - 1, len(begins) - 1]
    return np.asarray(reached[last] - begins[new])
