"""How long a batch runs on the device: by the rows that are computed and by what runs beside it.

Batches on several lanes share the device, so each is slower the more there are (processor sharing). What `k` batches of
as many rows need at a time is measured at some levels of k, and is linear between them. Batches of unlike rows count as
much as they take of a full device: on an H100 a ResNet-18's batch of 1 beside one of 8 was as slow as beside 4.8 of its
own, and 8 rows take 4.4 times as much of a full device as 1. Between rows that were measured times follow a power of
the rows, since small batches leave much of a device idle. Beyond what was measured the last two are continued, and
`outside` says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log


@dataclass(frozen=True, slots=True)
class Power:
    """A positive quantity at ascending rows; between them, and beyond, it follows a power of the rows."""

    rows: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Beyond one that is known alone it is in proportion."""
        if rows in self.rows:
            return self.values[self.rows.index(rows)]
        if len(self.rows) == 1:
            return self.values[0] * rows / self.rows[0]
        above = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        return _power(self.rows[above - 1 : above + 1], self.values[above - 1 : above + 1], rows)


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds that each of k batches runs, at ascending levels of k, which are 1 or more."""

    levels: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, running: float) -> float:
        """Below the first level the time is the first's; above the last, all of the device is shared."""
        if running <= self.levels[0]:
            return self.seconds[0]
        if running >= self.levels[-1]:
            return self.seconds[-1] * running / self.levels[-1]
        above = bisect_left(self.levels, running)
        return _between(self.levels[above - 1 : above + 1], self.seconds[above - 1 : above + 1], running)


@dataclass(frozen=True, slots=True)
class ServiceLaw:
    """Curves by the rows of a batch, ascending, and what each takes of a device that is full."""

    rows: tuple[int, ...]
    curves: tuple[Curve, ...]
    work_s: Power

    def at(self, rows: int, running: float) -> float:
        """Return the seconds that a batch of `rows` runs while `running` such do, itself among them."""
        above = bisect_left(self.rows, rows)
        if above < len(self.rows) and self.rows[above] == rows:
            return self.curves[above].at(running)
        if above == 0:  # a part of a batch takes as long, at worst
            return self.curves[0].at(running)
        if above == len(self.rows):
            return self._beyond(rows, running)
        pair = slice(above - 1, above + 1)
        return _power(self.rows[pair], [curve.at(running) for curve in self.curves[pair]], rows)

    def outside(self, rows: int, running: float) -> str | None:
        """Say how far a prediction lies from what was measured; None within."""
        if not self.rows[0] <= rows <= self.rows[-1]:
            return f"buckets of {rows} rows: measured were {self.rows[0]} to {self.rows[-1]}"
        near = min(self.curves, key=lambda curve: abs(self.rows[self.curves.index(curve)] - rows))
        if running > near.levels[-1] * 1.1:
            return f"{running:g} batches at once: measured were up to {near.levels[-1]:.3g} of about {rows} rows"
        return None

    def _beyond(self, rows: int, running: float) -> float:
        """Continue the line of the last two, which is at most in proportion to the rows."""
        last, seconds = self.rows[-1], self.curves[-1].at(running)
        if len(self.rows) == 1:
            return seconds * rows / last
        slope = (seconds - self.curves[-2].at(running)) / (last - self.rows[-2])
        return seconds + min(max(slope, 0.0), seconds / last) * (rows - last)


def _between(ends: Sequence[float], values: Sequence[float], at: float) -> float:
    share = (at - ends[0]) / (ends[1] - ends[0])
    return values[0] + share * (values[1] - values[0])


def _power(ends: Sequence[float], values: Sequence[float], at: float) -> float:
    return exp(_between([log(end) for end in ends], [log(value) for value in values], log(at)))
