"""How many more runs it would take until an interval is narrow enough to tell a difference that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import chdtri

from headrace.study.welch import Moments, half_width

MOST = 200  # more runs than this is no advice
CAUTION = 0.8  # so likely is the cautious number enough, as far as the spread is to blame


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreRuns:
    """Of each side; None: more than `MOST`."""

    likely: int | None  # if the spread is what these runs show
    cautious: int | None  # if it is as large as it may well be: few runs know little of their spread

    def __str__(self) -> str:
        if self.likely is None:
            return f"more than {MOST} more runs"
        if self.cautious == self.likely:
            return f"{self.likely} more runs"
        return f"{self.likely} more runs (up to {self.cautious if self.cautious is not None else f'{MOST} and above'})"


def more_runs(spreads: Sequence[Moments], threshold: float) -> MoreRuns:
    """Return how many until the interval reaches no further than `threshold` (0.02 for 2 %) to either side.

    `spreads` are of logarithms, as `intervals.Ratio` has them. The cautious number takes each variance at its upper
    80 % limit, by chi-squared (G. W. Snedecor and W. G. Cochran, Statistical Methods, 8th edition, section 5.11).
    """
    wider = [
        Moments(
            mean=spread.mean, std=spread.std * math.sqrt((spread.n - 1) / chdtri(spread.n - 1, CAUTION)), n=spread.n
        )
        for spread in spreads
    ]
    return MoreRuns(likely=_search(spreads, threshold), cautious=_search(wider, threshold))


def _search(spreads: Sequence[Moments], threshold: float) -> int | None:
    def enough(more: int) -> bool:
        grown = [Moments(mean=spread.mean, std=spread.std, n=spread.n + more) for spread in spreads]
        return half_width(grown) <= math.log1p(threshold)

    return next((more for more in range(MOST + 1) if enough(more)), None)
