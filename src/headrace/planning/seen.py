"""A run's batches as the fit sees them: with how many ran beside each, by levels, and which of them say something."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt

from headrace.planning.law import ServiceLaw
from headrace.planning.observe import Batches, Observed, Seconds

LEAST = 20  # batches that a level is taken from
LEAST_SHARE = 0.1  # of a run's batches
LEVELS_PER_DOUBLING = 2
LATE_TIMES = 3.0  # times what is usual: later than that is a pause
LATE_S = 0.5e-3  # and by at least so much


@dataclass(frozen=True, slots=True)
class Seen:
    """A run's batches, and how many ran beside each."""

    run: Observed
    batches: Batches
    running: Seconds


def level_of(running: float) -> int:
    return round(log2(running) * LEVELS_PER_DOUBLING)


def levels(running: Seconds) -> Seconds:
    return np.asarray(np.rint(np.log2(running) * LEVELS_PER_DOUBLING))


def usual(seen: Seen) -> npt.NDArray[np.bool_]:
    """Leave out what says little of the device.

    Batches are told in the order of their launch, and after a pause several at once: those that ended together, and
    those that ran beside more or fewer others than is usual in the run, were mostly told late.
    """
    _, which, counts = np.unique(levels(seen.running), return_inverse=True, return_counts=True)
    return np.asarray(seen.batches.sure & (counts[which] >= LEAST_SHARE * len(which)))


def on_time(seconds: Seconds, usual_s: Seconds | float) -> npt.NDArray[np.bool_]:
    """Tell what took no longer than a pause would make it take."""
    return np.asarray(seconds <= np.maximum(LATE_TIMES * usual_s, usual_s + LATE_S))


def expected_s(seen: Seen, law: ServiceLaw) -> Seconds:
    """Return what the law says of each of a run's batches."""
    rows, running = seen.batches.rows.tolist(), seen.running.tolist()
    return np.array([law.at(size, at) for size, at in zip(rows, running, strict=True)])
