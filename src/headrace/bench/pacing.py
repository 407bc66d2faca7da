"""When the next request may go: by a plan, or as soon as another one is answered.

A plan is kept, however late the sender is: what is due is due, and lateness shows as issue delay.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headrace.bench.arrivals import Offsets
from headrace.clock import NS_PER_S, Clock, now_ns
from headrace.processes import exact_sleep

SPIN_NS = 60_000  # how long before a request is due the sender stops sleeping
LONGEST_SLEEP_S = 0.5  # between two looks whether the run has been stopped

Moments = npt.NDArray[np.int64]


class Pace(Protocol):
    """Says how many requests may have been sent by now."""

    concurrency: int | None  # in flight at most

    def start(self) -> None:
        """Begin now."""

    def due(self, sent: int) -> int:
        """Return how many requests are due by now, at least `sent`."""

    def over(self, sent: int) -> bool:
        """Tell whether no more will be due than the `sent` that were."""

    def wait(self, sent: int, stop: threading.Event) -> bool:
        """Wait until more than `sent` requests are due; False if no more will be, or `stop` is set."""

    def scheduled(self, completed: Moments) -> Moments:
        """Return when each request was due, given when each was answered, both in order of sending."""


class Planned:
    """At the moments of a plan, whatever comes back."""

    def __init__(self, offsets: Offsets, clock: Clock = now_ns) -> None:
        self.concurrency: int | None = None
        self._due_ns: Moments = offsets.copy()
        self._clock = clock

    def start(self) -> None:
        exact_sleep()
        self._due_ns += self._clock()

    def due(self, sent: int) -> int:
        return max(sent, int(np.searchsorted(self._due_ns, self._clock(), side="right")))

    def over(self, sent: int) -> bool:
        return sent == len(self._due_ns)

    def wait(self, sent: int, stop: threading.Event) -> bool:
        if self.over(sent):
            return False
        next_ns = int(self._due_ns[sent])
        while (wait_ns := next_ns - self._clock()) > 0:
            if stop.is_set():
                return False
            if wait_ns > SPIN_NS:
                time.sleep(min((wait_ns - SPIN_NS) / NS_PER_S, LONGEST_SLEEP_S))
        return True

    def scheduled(self, completed: Moments) -> Moments:
        return self._due_ns[: len(completed)]


class Closed:
    """`concurrency` in flight: each answer makes the next request due, for `duration_s` where that is given."""

    def __init__(self, count: int, concurrency: int, duration_s: float | None, clock: Clock = now_ns) -> None:
        self._count = count
        self.concurrency: int | None = concurrency
        self._duration_ns = None if duration_s is None else int(duration_s * NS_PER_S)
        self._clock = clock
        self._start_ns = 0

    def start(self) -> None:
        self._start_ns = self._clock()

    def due(self, sent: int) -> int:
        return sent if self.over(sent) else self._count

    def over(self, sent: int) -> bool:
        if sent == self._count:
            return True
        return self._duration_ns is not None and self._clock() - self._start_ns >= self._duration_ns

    def wait(self, sent: int, stop: threading.Event) -> bool:
        return not (stop.is_set() or self.over(sent))

    def scheduled(self, completed: Moments) -> Moments:
        """The first `concurrency` were due at once, and each later one when one more had been answered."""
        due = np.full(len(completed), self._start_ns, dtype=np.int64)
        later = due[self.concurrency :]
        later[:] = np.sort(completed)[: len(later)]
        return due
