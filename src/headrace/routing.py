"""Which of several engines gets a request: the one that is expected to answer it first.

A sender knows of an engine how many of its rows are under way there, and how long answers took. Rows over the time that
they took, the rate, would be enough where work simply adds up. Engines run batches, though: one row takes about as long
as a largest batch, so an engine that is given little looks slow by its rate, and would be given less and less. So each
answer's time is set against the load that its request met, a largest batch more, and the next one's time is expected in
proportion (Little's law gives the same for long queues):

    expected = mean time * (rows under way + rows + largest batch) / (mean load + largest batch)

Only what was answered well counts: an engine that fails fast must not look fast.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.clock import NS_PER_S

WEIGHT = 1 / 32  # of an answer, in the means
KNOWN_AFTER = 4  # answers: one alone may have been slow by chance
OUTLIER = 4  # times the mean: an answer that took longer, by a hiccup or the first of a change, counts as this
TIE = 1.25  # expectations that differ by less are alike: then the engine with fewer rows under way is taken
STALE_NS = 2 * NS_PER_S  # an engine that was not asked for so long, and
STALE_TIMES = 100  # passed over so many times, may be another one by now: it is asked again


class EngineLoad:
    """What one sender has under way at one engine, and has seen of it. A request is begun, sent, answered, ended."""

    __slots__ = ("_batch", "_count", "_last_ns", "_load", "_passed_over", "_took_ns", "rows")

    def __init__(self, largest_batch: int) -> None:
        self.rows = 0  # under way
        self._batch = largest_batch
        self._count = 0
        self._load = self._took_ns = 0.0
        self._last_ns = 0
        self._passed_over = 0

    def answered(self, load_rows: int, took_ns: int, now_ns: int) -> None:
        """Note an answer: `load_rows` were under way when its request was sent, its own among them."""
        if self._is_stale(now_ns):  # what was seen before says nothing of what it is now
            self._count, self._load, self._took_ns = 0, 0.0, 0.0
        if self._count >= KNOWN_AFTER:
            took_ns = min(took_ns, round(OUTLIER * self._took_ns))
        self._count += 1
        weight = max(WEIGHT, 1 / self._count)
        self._load += weight * (load_rows + self._batch - self._load)
        self._took_ns += weight * (took_ns - self._took_ns)
        self._last_ns = now_ns
        self._passed_over = 0

    def pass_over(self) -> None:
        """Another engine was taken."""
        self._passed_over += 1

    def pace(self, now_ns: int) -> float | None:
        """Return nanoseconds per row of load; None if nothing is known that is still true."""
        known = self._count >= KNOWN_AFTER and not (self._is_stale(now_ns) and not self.rows)
        return self._took_ns / self._load if known else None

    def _is_stale(self, now_ns: int) -> bool:
        return self._passed_over >= STALE_TIMES and now_ns - self._last_ns > STALE_NS

    def expected(self, rows: int, pace: float) -> float:
        """Return how long a request of so many rows would take, at this pace."""
        return pace * (self.rows + rows + self._batch)


def by_expected_answer(loads: Sequence[EngineLoad], rows: int, now_ns: int, turn: int) -> list[int]:
    """Return the numbers of all engines, the one that should get a request of `rows` rows first.

    One that nothing is known of is taken to be as fast as the others are on average. Of engines that are alike, those
    with fewer rows under way go first, then they take turns: `turn` is another number for each request.
    """
    paces = [load.pace(now_ns) for load in loads]
    known = [pace for pace in paces if pace is not None]
    usual = sum(known) / len(known) if known else 1.0
    expected = [load.expected(rows, usual if pace is None else pace) for load, pace in zip(loads, paces, strict=True)]
    limit, count = TIE * min(expected), len(loads)
    ranks = [
        (0.0 if expected[number] <= limit else expected[number], load.rows, (number - turn) % count, number)
        for number, load in enumerate(loads)
    ]
    ranks.sort()
    return [rank[-1] for rank in ranks]


class Spread:
    """Chooses engines for one request after the other."""

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn = 0

    def order(self, loads: Sequence[EngineLoad], rows: int, now_ns: int) -> list[int]:
        """See `by_expected_answer`. The first is taken to get the request."""
        if len(loads) <= 1:
            return list(range(len(loads)))
        order = by_expected_answer(loads, rows, now_ns, self._turn)
        self._turn += 1
        for number in order[1:]:
            loads[number].pass_over()
        return order
