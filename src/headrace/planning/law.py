"""How long a batch runs on the device: by its bucket's rows and by how many batches run beside it.

Batches on several lanes share the device, so each is slower the more there are (processor sharing). What `k` batches of
one bucket need at a time is measured at some levels of k and is linear between them; so it is in rows between buckets
that were measured. Beyond what was measured a prediction is one of proportion, and `outside` says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


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
    """Curves by rows of the bucket, ascending."""

    rows: tuple[int, ...]
    curves: tuple[Curve, ...]

    def at(self, rows: int, running: float) -> float:
        """Return the seconds that a batch of a bucket of `rows` runs while `running` batches do, itself among them."""
        above = bisect_left(self.rows, rows)
        if above < len(self.rows) and self.rows[above] == rows:
            return self.curves[above].at(running)
        if above == 0:  # a part of a batch takes as long, at worst
            return self.curves[0].at(running)
        if above == len(self.rows):
            return self.curves[-1].at(running) * rows / self.rows[-1]
        pair = slice(above - 1, above + 1)
        return _between(self.rows[pair], [curve.at(running) for curve in self.curves[pair]], rows)

    def outside(self, rows: int, running: float) -> str | None:
        """Say how far a prediction lies from what was measured; None within."""
        if not self.rows[0] <= rows <= self.rows[-1]:
            return f"buckets of {rows} rows: measured were {self.rows[0]} to {self.rows[-1]}"
        near = min(self.curves, key=lambda curve: abs(self.rows[self.curves.index(curve)] - rows))
        if running > near.levels[-1] * 1.1:
            return f"{running:g} batches at once: measured were up to {near.levels[-1]:.3g} of about {rows} rows"
        return None


def _between(ends: Sequence[float], values: Sequence[float], at: float) -> float:
    share = (at - ends[0]) / (ends[1] - ends[0])
    return values[0] + share * (values[1] - values[0])
