"""The one clock. Everything that is measured is integer nanoseconds of it.

`time.perf_counter_ns` is CLOCK_MONOTONIC on Linux: it never steps back, and readings of different processes of one
machine can be subtracted. Source: Python docs, time.perf_counter; clock_gettime(2).
"""

import time
from typing import Protocol

NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Returns nanoseconds since some fixed moment."""

    def __call__(self) -> int: ...


now_ns: Clock = time.perf_counter_ns


def seconds(nanoseconds: float) -> float:
    return nanoseconds / NS_PER_S
