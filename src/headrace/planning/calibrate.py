"""Fits the model of an engine to runs: how long batches run, what the transport adds, how often the host pauses.

A pause is a time in which the host does nothing for us: the process or its virtual CPU is not run. It shows as a batch
that ended long after it should have, and as a request that lay in the transport for long. Such times are taken out of
the distributions of batches and transport, and come back as pauses of the measured number and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log, log2

import numpy as np
import numpy.typing as npt

from headrace.clock import NS_PER_S
from headrace.planning.law import Curve, Power, ServiceLaw
from headrace.planning.observe import Batches, Observed, Seconds

LEAST = 20  # batches that a level of the law is taken from
LEAST_SHARE = 0.1  # of a run's batches
STEEPNESS = 2.0  # runs whose requests differ by a factor of e in rows or rate weigh e^2 times less
MIXED = 20_000  # values that stand for a mix of distributions
ADDED_UP = 8  # batches that follow each other on a lane
LATE_TIMES = 3.0  # times the median: later than that is a pause
LATE_S = 0.5e-3  # and by at least so much
LEVELS_PER_DOUBLING = 2
HIDDEN = 0.5  # of its own time: what waits longer begins while it waits
CLOSE = 1.1  # how far beyond its levels a curve is taken for measured


@dataclass(frozen=True, slots=True)
class Pauses:
    """Times in which the host stood still."""

    per_s: float
    lengths: Seconds  # may be empty

    @property
    def share(self) -> float:
        """Of all time."""
        return self.per_s * float(self.lengths.mean()) if len(self.lengths) else 0.0


Noise = dict[int, Seconds]  # by level: a batch's time over the law's, enough of them


@dataclass(frozen=True, slots=True)
class Habits:
    """What alike runs add to the law. Transport is in seconds."""

    rows: int  # of a request
    requests_per_s: float
    closed: bool  # an answer makes the next request due
    before: Seconds  # from a request's issue until the engine has it
    after: Seconds  # from its end until the answer
    again: Seconds  # from an answer until the client has sent the next request; none in an open loop
    noise: Noise

    def unlike(self, rows: int, requests_per_s: float) -> float:
        """Return how unlike such requests these were."""
        return abs(log(self.rows / rows)) + abs(log(self.requests_per_s / requests_per_s))


@dataclass(frozen=True, slots=True)
class Idle:
    """Seconds that a batch takes longer that finds its lane idle, where that is known: copies that nothing hides.

    Behind another they go on while it waits.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Between known rows on a line, which goes on beyond the last of several."""
        if not self.rows:
            return 0.0
        if len(self.rows) == 1 or rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return self.seconds[-1] + max(slope, 0.0) * (rows - self.rows[-1])


@dataclass(frozen=True, slots=True)
class Alike:
    """A mix of runs' habits, the more of each the more alike its requests were in rows and rate.

    Each request costs the host time, so their rate counts as their rows do. A mix changes little by little with the
    rate, where the most alike alone would change at once.
    """

    habits: tuple[Habits, ...]
    rows: int
    requests_per_s: float
    closed: bool
    random: np.random.Generator

    def before(self) -> Seconds:
        return self._mix([(each, each.before) for each in self.habits])

    def after(self) -> Seconds:
        return self._mix([(each, each.after) for each in self.habits])

    def again(self) -> Seconds:
        return self._mix([(each, each.again) for each in self.habits if len(each.again)])

    def noise(self, running: float) -> Seconds:
        """Return that of batches beside which about as many ran, in such loops where there were any.

        A client that waits for the moment at which its next request is due keeps a processor busy. On a host with few
        it takes that from the model: on two, a tenth of the batches took twice as long.
        """
        noisy = [each for each in self.habits if each.noise]
        chosen = [each for each in noisy if each.closed == self.closed] or noisy
        return self._mix([(each, noise_near(each.noise, running)) for each in chosen], otherwise=1.0)

    def _mix(self, parts: Sequence[tuple[Habits, Seconds]], otherwise: float = 0.0) -> Seconds:
        """Draw from each as many as its likeness says."""
        if not parts:
            return np.full(1, otherwise)
        distances = np.array([each.unlike(self.rows, self.requests_per_s) for each, _ in parts])
        weights = np.exp(-STEEPNESS * (distances - distances.min()))
        counts = np.rint(weights / weights.sum() * MIXED).astype(int)
        return np.concatenate(
            [self.random.choice(values, count) for (_, values), count in zip(parts, counts, strict=True) if count]
        )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The model of an engine, fitted."""

    law: ServiceLaw
    idle: Idle
    habits: tuple[Habits, ...]
    pauses: Pauses  # of all runs together: they are the machine's

    def alike(self, rows: int, requests_per_s: float, random: np.random.Generator, *, closed: bool) -> Alike:
        return Alike(self.habits, rows, requests_per_s, closed, random)

    def mean_noise(self, running: float) -> float:
        """Return the mean factor of batches beside which about as many run."""
        near = [noise_near(each.noise, running) for each in self.habits if each.noise]
        return float(np.concatenate(near).mean()) if near else 1.0


def noise_near(noise: Noise, running: float) -> Seconds:
    return noise[min(noise, key=lambda level: abs(level - level_of(running)))]


def calibrate(runs: Sequence[Observed], *, pauses: bool = True) -> Calibrated:
    """Fit to at least one run. Without `pauses` the host never stands still."""
    work_s = _work(runs)
    idle = _idle([_Seen(run, run.batches, run.batches.running(work_s.at)) for run in runs])
    begun = [run.batches.begun(idle.at) for run in runs]
    seen = [_Seen(run, batches, batches.running(work_s.at)) for run, batches in zip(runs, begun, strict=True)]
    law = _fit(seen, work_s)
    found = [_pauses_of(each, law) if pauses else np.empty(0) for each in seen]
    return Calibrated(
        law=law,
        idle=idle,
        habits=tuple(_habits(seen, law)),
        pauses=_together(runs, found),
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """A run's batches, and how many ran beside each."""

    run: Observed
    batches: Batches
    running: Seconds


Points = dict[int, tuple[float, float]]  # by level: mean number running, seconds


def _work(runs: Sequence[Observed]) -> Power:
    """Return what a batch takes of a full device, by its rows: the least that was seen of one among several."""
    least: dict[int, float] = {}
    for run in runs:
        found = {int(run.batches.rows[0]): _alike(run)} if (run.batches.rows == run.batches.rows[0]).all() else {}
        limits = run.summary.limits
        if limits is not None:
            found[limits.bucket] = limits.bucket / max(limits.forward_samples_per_s.values())
        for rows, seconds in found.items():
            least[rows] = min(seconds, least.get(rows, inf))
    if not least:  # no run has batches of one size alone
        return Power((1,), (1.0,))
    known = sorted(least)
    # More rows never take less.
    return Power(tuple(known), tuple(np.maximum.accumulate([least[each] for each in known]).tolist()))


def _alike(run: Observed) -> float:
    """Return the time of batches that all have as many rows, over the number at once."""
    return float(np.median(run.batches.seconds / run.batches.running(lambda _rows: 1.0)))


def _idle(seen: Sequence[_Seen]) -> Idle:
    """Compare batches that found their lane idle with those behind others, and with the model alone.

    They are told apart where a batch has the device to itself: with others beside it, their beginnings count too.
    """
    found = {}
    for rows in _sizes(seen):
        idle = _points(seen, rows, lambda each: _usual(each) & (each.batches.waited == 0))
        behind = _points(seen, rows, lambda each: _usual(each) & _hidden(each))
        known = _filled_up(behind, _alone(seen, rows))
        if 0 in idle and 0 in known:
            found[rows] = max(0.0, idle[0][1] - known[0][1])
    return Idle(tuple(found), tuple(found.values()))


def _fit(seen: Sequence[_Seen], work_s: Power) -> ServiceLaw:
    """Join what batches show with the shape of the model alone, and with what those of other rows show."""
    sizes = _sizes(seen)
    points = {
        rows: _filled_up(_points(seen, rows, _usual) or _any_points(seen, rows), _alone(seen, rows)) for rows in sizes
    }
    return ServiceLaw(tuple(sizes), tuple(_curve(_shaped(rows, points)) for rows in sizes), work_s)


def _sizes(seen: Sequence[_Seen]) -> list[int]:
    """Return of how many rows batches were, those few that are too few to say much left out."""
    sizes, counts = np.unique(np.concatenate([each.batches.rows for each in seen]), return_counts=True)
    enough = sizes[counts >= LEAST]
    return [int(rows) for rows in (enough if len(enough) else sizes)]


def _curve(points: Points) -> Curve:
    ordered = sorted(points.values())
    # More beside it never make a batch faster.
    seconds = np.maximum.accumulate([seconds for _, seconds in ordered])
    return Curve(tuple(at for at, _ in ordered), tuple(seconds.tolist()))


def level_of(running: float) -> int:
    return round(log2(running) * LEVELS_PER_DOUBLING)


def _levels(running: Seconds) -> Seconds:
    return np.asarray(np.rint(np.log2(running) * LEVELS_PER_DOUBLING))


def _points(seen: Iterable[_Seen], rows: int, chosen: Callable[[_Seen], npt.NDArray[np.bool_]]) -> Points:
    """Return for each level of enough batches the median: pauses make some late, and those told with them early."""
    running, seconds = _of_rows(seen, rows, chosen)
    levels = _levels(running)
    points: Points = {}
    for level in np.unique(levels):
        here = levels == level
        if here.sum() >= LEAST:
            points[int(level)] = (float(np.median(running[here])), float(np.median(seconds[here])))
    return points


def _any_points(seen: Iterable[_Seen], rows: int) -> Points:
    """Return one point of all batches, however few."""
    running, seconds = _of_rows(seen, rows, lambda each: np.ones(len(each.running), dtype=bool))
    return {level_of(float(np.median(running))): (float(np.median(running)), float(np.median(seconds)))}


def _of_rows(
    seen: Iterable[_Seen], rows: int, chosen: Callable[[_Seen], npt.NDArray[np.bool_]]
) -> tuple[Seconds, Seconds]:
    parts = [(each, chosen(each) & (each.batches.rows == rows)) for each in seen]
    running = np.concatenate([each.running[here] for each, here in parts])
    return running, np.concatenate([each.batches.seconds[here] for each, here in parts])


def _usual(seen: _Seen) -> npt.NDArray[np.bool_]:
    """Leave out what says little of the device.

    Batches are told in the order of their launch, and after a pause several at once: those that ended together, and
    those that ran beside more or fewer others than is usual in the run, were mostly told late.
    """
    _, which, counts = np.unique(_levels(seen.running), return_inverse=True, return_counts=True)
    return np.asarray(seen.batches.sure & (counts[which] >= LEAST_SHARE * len(which)))


def _latest(usual_s: float) -> float:
    return max(LATE_TIMES * usual_s, usual_s + LATE_S)


def _alone(seen: Iterable[_Seen], rows: int) -> Points:
    """Return what the runs' own limits say of the model alone, without copies and answers.

    Those of a CPU say nothing here: there each number of streams has other threads.
    """
    found: dict[int, list[float]] = {}
    for limits in (each.run.summary.limits for each in seen if each.run.summary.options.device_kind != "cpu"):
        if limits is not None and limits.bucket == rows:
            for streams, rate in limits.forward_samples_per_s.items():
                found.setdefault(streams, []).append(streams * rows / rate)
    return {level_of(streams): (float(streams), float(np.mean(seconds))) for streams, seconds in found.items()}


def _filled_up(points: Points, alone: Points) -> Points:
    """Add levels that served batches do not show: longer than the model alone by as much as at the levels beside."""
    if not points or not alone:
        return points
    curve = _curve(alone)
    ordered = sorted(points.values())
    at = np.log([running for running, _ in ordered])
    longer = np.log([seconds / curve.at(running) for running, seconds in ordered])
    added = {level: alone[level] for level in alone.keys() - points.keys()}
    return points | {
        level: (running, seconds * exp(np.interp(log(running), at, longer)))
        for level, (running, seconds) in added.items()
    }


def _shaped(rows: int, points: Mapping[int, Points]) -> Points:
    """Add levels that batches of other rows show: slower than at the nearest level by what those are, as rows grow."""
    own, others = points[rows], {size: _curve(points[size]) for size in points if size != rows}
    levels = {level: at for size in others for level, (at, _) in points[size].items() if level not in own}
    filled = dict(own)
    for level, running in levels.items():
        near = own[min(own, key=lambda each: abs(each - level))]
        slower = {
            size: log(curve.at(running) / curve.at(near[0]))
            for size, curve in others.items()
            if all(curve.levels[0] <= at * CLOSE and at <= curve.levels[-1] * CLOSE for at in (running, near[0]))
        }
        if slower:
            least, most = sorted((0.0, log(running / near[0])))
            filled[level] = (running, near[1] * exp(min(max(_along(slower, rows), least), most)))
    return filled


def _along(values: Mapping[int, float], rows: int) -> float:
    """Return what values by rows say of other rows: on a line over the logarithm through the nearest two."""
    sizes = sorted(values, key=lambda size: abs(log(size / rows)))
    below, above = [each for each in sizes if each < rows][:1], [each for each in sizes if each > rows][:1]
    pair = sorted(below + above if below and above else sizes[:2])
    if len(pair) == 1:
        return values[pair[0]]
    share = log(rows / pair[0]) / log(pair[1] / pair[0])
    return values[pair[0]] + share * (values[pair[1]] - values[pair[0]])


def _hidden(seen: _Seen) -> npt.NDArray[np.bool_]:
    """Tell which batches waited behind another for so long that their beginning cost them nothing."""
    return np.asarray(seen.batches.waited >= HIDDEN * seen.batches.seconds)


def _expected_s(seen: _Seen, law: ServiceLaw) -> Seconds:
    """Return what the law says of each of a run's batches."""
    rows, running = seen.batches.rows.tolist(), seen.running.tolist()
    return np.array([law.at(size, at) for size, at in zip(rows, running, strict=True)])


def _on_time(seconds: Seconds, expected: Seconds) -> npt.NDArray[np.bool_]:
    return np.asarray(seconds <= np.maximum(LATE_TIMES * expected, expected + LATE_S))


def _noise(seen: Sequence[_Seen], law: ServiceLaw) -> Noise:
    factors, levels = [np.empty(0)], [np.empty(0)]
    for each in seen:
        expected = _expected_s(each, law)
        on_time = _on_time(each.batches.seconds, expected) & _usual(each)
        own = (each.batches.seconds / expected)[on_time]
        if len(own):
            # What a run differs from the law by is the law's error, not noise.
            factors.append(1 + (own / np.median(own) - 1) * _lasting(own))
            levels.append(_levels(each.running)[on_time])
    all_factors, at = np.concatenate(factors), np.concatenate(levels)
    noise = {int(level): all_factors[at == level] for level in np.unique(at)}
    return {level: found for level, found in noise.items() if len(found) >= LEAST}


def _lasting(factors: Seconds) -> float:
    """Return the share of the noise that stays when batches that follow each other are added up.

    A batch that is seen late makes the next one on its lane seem short; that is no noise of the device.
    """
    groups = factors[: len(factors) // ADDED_UP * ADDED_UP].reshape(-1, ADDED_UP)
    if len(groups) < 2 or not factors.std():
        return 1.0
    return min(1.0, float(groups.mean(axis=1).std() * np.sqrt(ADDED_UP) / factors.std()))


def _habits(seen: Sequence[_Seen], law: ServiceLaw) -> Iterable[Habits]:
    for cell in sorted({each.run.cell for each in seen}):
        alike = [each for each in seen if each.run.cell == cell]
        runs = [each.run for each in alike]
        staged = [run.records for run in runs if run.staged]
        before, after = np.zeros(1), np.zeros(1)  # else all is in the batches' own times
        if staged:
            before = np.concatenate([records["received_ns"] - records["issued_ns"] for records in staged]) / NS_PER_S
            before = before[before <= _latest(float(np.median(before)))]
            after = np.concatenate([records["completed_ns"] - records["computed_ns"] for records in staged]) / NS_PER_S
        yield Habits(
            rows=runs[0].setup.rows,
            requests_per_s=float(np.mean([run.requests_per_s for run in runs])),
            closed=runs[0].concurrency is not None,
            before=before,
            after=after,
            again=np.concatenate([_again(run) for run in runs]),
            noise=_noise(alike, law),
        )


def _again(run: Observed) -> Seconds:
    """The n-th answer lets the client send the request that is n + `concurrency` in order; nothing in an open loop."""
    concurrency = run.concurrency
    if concurrency is None or concurrency >= len(run.records):
        return np.empty(0)
    issued, completed = np.sort(run.records["issued_ns"]), np.sort(run.records["completed_ns"])
    gaps = np.maximum(issued[concurrency:] - completed[: len(issued) - concurrency], 0) / NS_PER_S
    return np.asarray(gaps[gaps <= _latest(float(np.median(gaps)))])


def _together(runs: Sequence[Observed], pauses: Sequence[Seconds]) -> Pauses:
    return Pauses(sum(map(len, pauses)) / sum(run.window_s for run in runs), np.concatenate(pauses))


def _pauses_of(seen: _Seen, law: ServiceLaw) -> Seconds:
    """Return the lengths of a run's pauses: where its late batches and late requests overlap, they are of one."""
    run, batches = seen.run, seen.batches
    expected = _expected_s(seen, law)
    late = ~_on_time(batches.seconds, expected)
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
