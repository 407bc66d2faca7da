"""Which rate to try next: bisection in the logarithm, from a guess that nothing is sure of. Pure."""

from __future__ import annotations

import math

FIRST = 0.7  # of the guess: a server that waits for no queue holds less than it can do at most
GROW = 1.25  # beyond a guess that turned out too low
LEAST = 1 / 512  # of the guess: below it nothing holds
MOST = 64  # times the guess


class Bisection:
    """Keeps what held and what did not, and names the next rate until they are as near as `resolution` (0.05: 5 %).

    The guess is an upper one (what the server did at most), and is tried only if everything below it holds.
    """

    def __init__(self, guess: float, resolution: float) -> None:
        self._guess = guess
        self._near = 1 + resolution
        self._held: set[float] = set()
        self._failed: set[float] = set()

    @property
    def failed(self) -> float | None:
        """The lowest rate that did not hold."""
        return min(self._failed, default=None)

    @property
    def held(self) -> float | None:
        """The highest rate that held, below any that did not."""
        below = (rate for rate in self._held if self.failed is None or rate < self.failed)
        return max(below, default=None)

    def tell(self, rate: float, *, holds: bool) -> None:
        """Take the verdict on a rate; a later one replaces it."""
        self._held.discard(rate)
        self._failed.discard(rate)
        (self._held if holds else self._failed).add(rate)

    def next(self) -> float | None:
        """Return the rate to try now; None: it is known as well as asked, or nothing holds, or anything does."""
        low, high = self.held, self.failed
        if low is not None and high is not None:
            return math.sqrt(low * high) if high / low > self._near else None
        if low is not None:
            rate = self._above(low)
            return rate if rate <= MOST * self._guess else None
        if high is not None:
            rate = high / 2 ** (2 ** (len(self._failed) - 1) / 2)  # by 1.4, 2, 4, 16, ...
            return rate if rate >= LEAST * self._guess else None
        return FIRST * self._guess

    def _above(self, low: float) -> float:
        if low * self._near < self._guess:
            return math.sqrt(low * self._guess)
        return max(low * GROW, self._guess)
