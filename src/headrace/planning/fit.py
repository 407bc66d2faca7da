"""Fits the law of a device to runs: what batches of some rows take beside others, and what an idle lane costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
import numpy.typing as npt

from headrace.planning.law import Curve, Power, ServiceLaw
from headrace.planning.observe import Observed, Seconds
from headrace.planning.seen import LEAST, Seen, level_of, levels, usual

HIDDEN = 0.5  # of its own time: what waits longer begins while it waits
CLOSE = 1.1  # how far beyond its levels a curve is taken for measured

Points = dict[int, tuple[float, float]]  # by level: mean number running, seconds


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


def work_of(runs: Sequence[Observed]) -> Power:
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


def idle_of(seen: Sequence[Seen]) -> Idle:
    """Compare batches that found their lane idle with those behind others, and with the model alone.

    They are told apart where a batch has the device to itself: with others beside it, their beginnings count too.
    """
    found = {}
    for rows in _sizes(seen):
        idle = _points(seen, rows, lambda each: usual(each) & (each.batches.waited == 0))
        behind = _points(seen, rows, lambda each: usual(each) & _hidden(each))
        known = _filled_up(behind, _alone(seen, rows))
        if 0 in idle and 0 in known:
            found[rows] = max(0.0, idle[0][1] - known[0][1])
    return Idle(tuple(found), tuple(found.values()))


def _hidden(seen: Seen) -> npt.NDArray[np.bool_]:
    """Tell which batches waited behind another for so long that their beginning cost them nothing."""
    return np.asarray(seen.batches.waited >= HIDDEN * seen.batches.seconds)


def law_of(seen: Sequence[Seen], work_s: Power) -> ServiceLaw:
    """Join what batches show with the shape of the model alone, and with what those of other rows show."""
    sizes = _sizes(seen)
    points = {
        rows: _filled_up(_points(seen, rows, usual) or _any_points(seen, rows), _alone(seen, rows)) for rows in sizes
    }
    return ServiceLaw(tuple(sizes), tuple(_curve(_shaped(rows, points)) for rows in sizes), work_s)


def _sizes(seen: Sequence[Seen]) -> list[int]:
    """Return of how many rows batches were, those few that are too few to say much left out."""
    sizes, counts = np.unique(np.concatenate([each.batches.rows for each in seen]), return_counts=True)
    enough = sizes[counts >= LEAST]
    return [int(rows) for rows in (enough if len(enough) else sizes)]


def _curve(points: Points) -> Curve:
    ordered = sorted(points.values())
    # More beside it never make a batch faster.
    seconds = np.maximum.accumulate([seconds for _, seconds in ordered])
    return Curve(tuple(at for at, _ in ordered), tuple(seconds.tolist()))


def _points(seen: Iterable[Seen], rows: int, chosen: Callable[[Seen], npt.NDArray[np.bool_]]) -> Points:
    """Return for each level of enough batches the median: pauses make some late, and those told with them early."""
    running, seconds = _of_rows(seen, rows, chosen)
    at_levels = levels(running)
    points: Points = {}
    for level in np.unique(at_levels):
        here = at_levels == level
        if here.sum() >= LEAST:
            points[int(level)] = (float(np.median(running[here])), float(np.median(seconds[here])))
    return points


def _any_points(seen: Iterable[Seen], rows: int) -> Points:
    """Return one point of all batches, however few."""
    running, seconds = _of_rows(seen, rows, lambda each: np.ones(len(each.running), dtype=bool))
    return {level_of(float(np.median(running))): (float(np.median(running)), float(np.median(seconds)))}


def _of_rows(
    seen: Iterable[Seen], rows: int, chosen: Callable[[Seen], npt.NDArray[np.bool_]]
) -> tuple[Seconds, Seconds]:
    parts = [(each, chosen(each) & (each.batches.rows == rows)) for each in seen]
    running = np.concatenate([each.running[here] for each, here in parts])
    return running, np.concatenate([each.batches.seconds[here] for each, here in parts])


def _alone(seen: Iterable[Seen], rows: int) -> Points:
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
    missing = {level: at for size in others for level, (at, _) in points[size].items() if level not in own}
    filled = dict(own)
    for level, running in missing.items():
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
