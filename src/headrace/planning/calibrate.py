"""Fits the model of an engine to runs: how long batches run, what the transport adds, how often the host pauses.

A pause is a time in which the host does nothing for us: the process or its virtual CPU is not run. It shows as a batch
that ended long after it should have, and as a request that lay in the transport for long. Such times are taken out of
the distributions of batches and transport, and come back as pauses of the measured number and lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.clock import NS_PER_S
from headrace.planning.fit import Idle, idle_of, law_of, work_of
from headrace.planning.habits import Alike, Habits, habits_of, noise_near
from headrace.planning.law import ServiceLaw
from headrace.planning.observe import Observed, Seconds
from headrace.planning.seen import Seen, expected_s, on_time


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


def calibrate(runs: Sequence[Observed], *, pauses: bool = True) -> Calibrated:
    """Fit to at least one run. Without `pauses` the host never stands still."""
    work_s = work_of(runs)
    idle = idle_of([Seen(run, run.batches, run.batches.running(work_s.at)) for run in runs])
    begun = [run.batches.begun(idle.at) for run in runs]
    seen = [Seen(run, batches, batches.running(work_s.at)) for run, batches in zip(runs, begun, strict=True)]
    law = law_of(seen, work_s)
    expected = [expected_s(each, law) for each in seen]
    found = [_pauses_of(*each) if pauses else np.empty(0) for each in zip(seen, expected, strict=True)]
    return Calibrated(
        law=law,
        idle=idle,
        habits=tuple(habits_of(seen, expected)),
        pauses=_together(runs, found),
    )


def _together(runs: Sequence[Observed], pauses: Sequence[Seconds]) -> Pauses:
    return Pauses(sum(map(len, pauses)) / sum(run.window_s for run in runs), np.concatenate(pauses))


def _pauses_of(seen: Seen, expected: Seconds) -> Seconds:
    """Return the lengths of a run's pauses: where its late batches and late requests overlap, they are of one."""
    run, batches = seen.run, seen.batches
    late = ~on_time(batches.seconds, expected)
    end = batches.start_ns / NS_PER_S + batches.seconds
    begins, ends = [(end - batches.seconds + expected)[late]], [end[late]]
    if run.staged:
        issued, received = run.records["issued_ns"] / NS_PER_S, run.records["received_ns"] / NS_PER_S
        usual = float(np.median(received - issued))
        lay = ~on_time(received - issued, usual)
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
