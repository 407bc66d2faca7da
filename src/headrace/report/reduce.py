"""Columns of records made small enough to draw, extremes kept: percentiles, tails, envelopes, spans. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.bench.record import Records
from headrace.bench.stats import OK
from headrace.clock import NS_PER_S

Floats = npt.NDArray[np.float64]
Nanoseconds = npt.NDArray[np.int64]

# A request's life, in order: what each stage is called, and the stamps at its ends.
STAGES = (
    ("issue delay", "scheduled_ns", "issued_ns"),
    ("to the backend", "issued_ns", "received_ns"),
    ("wait", "received_ns", "started_ns"),
    ("compute", "started_ns", "computed_ns"),
    ("copy out", "computed_ns", "responded_ns"),
    ("back", "responded_ns", "completed_ns"),
)
POINTS = 1500  # up to so many requests are drawn one by one
COLUMNS = 240  # beyond it, up to so many columns from least to most
IN_COLUMN = 12  # requests of a column on average, at least
TAIL_POINTS = 90
PERCENT = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
VALUES_NEEDED = {"p50": 1, "p90": 10, "p99": 100, "p99.9": 1000}  # with fewer, one value at least cannot lie beyond it


@dataclass(frozen=True, slots=True)
class Tail:
    """A distribution, in seconds. `percentiles` leaves out those for which there are too few values."""

    count: int
    percentiles: dict[str, float]
    share_above: Floats  # descending from near 1 to 1/count
    at_s: Floats  # what that share of the values is above

    @property
    def max_s(self) -> float:
        return float(self.at_s[-1])


@dataclass(frozen=True, slots=True)
class Envelope:
    """Values over time, one by one, or as columns from the least to the most of each.

    All arrays have one length. Columns of equal width in which nothing happened are left out.
    """

    at_s: Floats
    low: Floats
    middle: Floats  # the median
    high: Floats
    count: int
    column_s: float  # width of a column; 0 where each value is there

    @property
    def is_reduced(self) -> bool:
        return self.column_s > 0


def tail(nanoseconds: Nanoseconds) -> Tail | None:
    """Return percentiles (linear between order statistics, as `bench.stats`) and a curve; None of no values."""
    count = len(nanoseconds)
    if not count:
        return None
    values = np.sort(nanoseconds).astype(np.float64) / NS_PER_S
    named = {name: percent for name, percent in PERCENT.items() if count >= VALUES_NEEDED[name]}
    percentiles = dict(zip(named, (float(value) for value in np.percentile(values, list(named.values()))), strict=True))
    share = np.geomspace(1.0, 1.0 / count, min(count, TAIL_POINTS)) if count > 1 else np.ones(1)
    rank = np.clip(np.round((1 - share) * count).astype(np.int64), 0, count - 1)
    rank[-1] = count - 1
    return Tail(count, percentiles, share, values[rank])


def stage_means_s(records: Records) -> tuple[float, ...] | None:
    """Return each stage's mean over the answered requests that have every stamp; None if there are none."""
    whole = records["status"] == OK
    for name in ("received_ns", "started_ns", "computed_ns", "responded_ns"):
        whole &= records[name] > 0
    if not whole.any():
        return None
    return tuple(float((records[end][whole] - records[begin][whole]).mean()) / NS_PER_S for _, begin, end in STAGES)


def batch_sizes(records: Records) -> dict[int, float]:
    """Return how many batches of each number of rows ran. A request of r rows in a batch of b is r/b of a batch."""
    if not (records["batch_rows"] > 0).any():
        return {}
    ran = (records["status"] == OK) & (records["batch_rows"] > 0)
    sizes, place = np.unique(records["batch_rows"][ran], return_inverse=True)
    rows = np.bincount(place, weights=records["rows"][ran].astype(np.float64))
    return {int(size): float(total / size) for size, total in zip(sizes, rows, strict=True)}


def envelope(at_ns: Nanoseconds, values_ns: Nanoseconds, zero_ns: int) -> Envelope:
    """Return values against time since `zero_ns`, both in seconds. At least one value."""
    order = np.argsort(at_ns, kind="stable")
    at = (at_ns[order] - zero_ns).astype(np.float64) / NS_PER_S
    values = values_ns[order].astype(np.float64) / NS_PER_S
    if len(at) <= POINTS or at[0] == at[-1]:
        return Envelope(at, values, values, values, len(at), 0.0)
    edges = np.linspace(at[0], at[-1], min(COLUMNS, len(at) // IN_COLUMN) + 1)
    starts = np.searchsorted(at, edges[:-1])
    ends = np.append(starts[1:], len(at))
    filled = ends > starts
    low = np.minimum.reduceat(values, starts[filled])
    high = np.maximum.reduceat(values, starts[filled])
    pairs = zip(starts[filled], ends[filled], strict=True)
    middle = np.array([np.median(values[start:end]) for start, end in pairs])
    centres = (edges[:-1] + edges[1:])[filled] / 2
    return Envelope(centres, low, middle, high, len(at), float(edges[1] - edges[0]))
