"""Which rows of a table are free: runs of consecutive rows are leased and given back. Pure bookkeeping, no memory.

Leases go round the table in order, so that requests sent one after the other mostly lie side by side; what comes back
joins its free neighbours, so nothing is wasted as time goes on, whatever the sizes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain


class RowLeases:
    """Free rows as sorted, disjoint runs [first, end) that never touch each other."""

    def __init__(self, rows: int) -> None:
        self._runs: list[tuple[int, int]] = [(0, rows)]
        self._cursor: int = 0  # where the last lease ended

    def lease(self, rows: int) -> int | None:
        """Take `rows` consecutive rows and return the first; None where no run is that long."""
        start = bisect_left(self._runs, (self._cursor, 0))
        for position in chain(range(start, len(self._runs)), range(start)):
            first, end = self._runs[position]
            if end - first >= rows:
                self._shorten(position, first + rows, end)
                self._cursor = first + rows
                return first
        return None

    def release(self, first: int, rows: int) -> None:
        """Give back a lease. Raises ValueError if any of it is free already: our own bug."""
        end = first + rows
        position = bisect_left(self._runs, (first, 0))
        before = self._runs[position - 1] if position else None
        after = self._runs[position] if position < len(self._runs) else None
        if (before and before[1] > first) or (after and after[0] < end):
            raise ValueError(f"rows {first} to {end - 1} are given back, but some of them are free")
        if after and after[0] == end:
            end = after[1]
            del self._runs[position]
        if before and before[1] == first:
            first = before[0]
            del self._runs[position - 1]
        insort(self._runs, (first, end))

    @property
    def free_rows(self) -> int:
        return sum(end - first for first, end in self._runs)

    def _shorten(self, position: int, first: int, end: int) -> None:
        if first == end:
            del self._runs[position]
        else:
            self._runs[position] = (first, end)
