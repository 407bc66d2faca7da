"""What goes on, in memory that generators write and the display reads: who measures does not display.

Latencies are counted in buckets that are at most 1/8 of their values wide: good enough to look at, and never reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import numpy.typing as npt

ISSUED, ANSWERED, FAILED, SHED, FIRST_BUCKET = range(5)
_UNIT_BITS = 10  # of 1,024 ns
_STEP_BITS = 3
BUCKETS = 40 << _STEP_BITS
WORDS = FIRST_BUCKET + BUCKETS

Counts = npt.NDArray[np.int64]


def shared_words(generators: int) -> Any:  # noqa: ANN401  ctypes arrays have no public type
    return RawArray("q", WORDS * generators)


def words_of(shared: Any, generator: int) -> memoryview:  # noqa: ANN401
    """Return the words that one generator writes."""
    return memoryview(shared).cast("B").cast("q")[WORDS * generator : WORDS * (generator + 1)]


def bucket(latency_ns: int) -> int:
    """Return the word that counts such a latency."""
    units = latency_ns >> _UNIT_BITS
    excess = max(0, units.bit_length() - _STEP_BITS - 1)
    return FIRST_BUCKET + min((excess << _STEP_BITS) + (units >> excess), BUCKETS - 1)


def _upper_s(place: int) -> float:
    if place < 2 << _STEP_BITS:
        excess, units = 0, place
    else:
        excess = (place >> _STEP_BITS) - 1
        units = place - (excess << _STEP_BITS)
    return ((units + 1) << (excess + _UNIT_BITS)) / 1e9


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two looks."""

    rate: float  # answers/s
    p50_s: float | None
    p99_s: float | None
    failed: int  # with what was shed


class Reader:
    """Sums the generators' words, and tells what is new."""

    def __init__(self, shared: Any, generators: int) -> None:  # noqa: ANN401
        self._words = np.frombuffer(shared, dtype=np.int64).reshape(generators, WORDS)
        self._before: Counts = np.zeros(WORDS, dtype=np.int64)

    def totals(self) -> Counts:
        totals: Counts = self._words.sum(axis=0)
        return totals

    def interval(self, seconds: float) -> Interval:
        """Return what is new since the last call, `seconds` ago."""
        now = self.totals()
        new, self._before = now - self._before, now
        failed = int(new[FAILED] + new[SHED])
        seen = np.cumsum(new[FIRST_BUCKET:])
        if not seen[-1]:
            return Interval(0.0, None, None, failed)
        at = [int(np.searchsorted(seen, share * seen[-1])) for share in (0.5, 0.99)]
        return Interval(float(new[ANSWERED] / seconds), _upper_s(at[0]), _upper_s(at[1]), failed)
