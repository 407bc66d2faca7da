"""How many more runs it would take to tell a difference that matters, and how small a one some runs could tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import chdtri

from headrace.study.welch import Moments, detectable, half_width

MOST = 200  # more runs than this is no advice
POWER = 0.8  # of experiments, in how many a difference is to be found
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


def smallest_ratio(base: Moments, candidate: Moments, power: float = POWER) -> float:
    """Return the smallest ratio of means above 1 that so many runs of such spread tell in a share `power` of trials.

    Downwards it is the inverse. By Welch's test at 5 % on logarithms, as `compare` does; the moments are of the values
    themselves, above 0, and the spread of their logarithms is that of a log-normal law with the same two moments.
    """
    logs = [
        Moments(mean=0.0, std=math.sqrt(math.log1p((side.std / side.mean) ** 2)), n=side.n)
        for side in (base, candidate)
    ]
    return math.exp(detectable(logs, power))


def _search(spreads: Sequence[Moments], threshold: float) -> int | None:
    def enough(more: int) -> bool:
        grown = [Moments(mean=spread.mean, std=spread.std, n=spread.n + more) for spread in spreads]
        return half_width(grown) <= math.log1p(threshold)

    return next((more for more in range(MOST + 1) if enough(more)), None)
