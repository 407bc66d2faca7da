"""What may be said of two sets of runs: a ratio with its interval, and words that claim no more than it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from headrace.study.intervals import Ratio, Runs, compare_runs
from headrace.study.power import MoreRuns, more_runs
from headrace.study.quantities import Quantity
from headrace.study.welch import RatioInterval, ratio_interval

THRESHOLD = 0.02  # a ratio within 1 +- this matters to nobody
WIDE = 10  # a ratio known no better than within this factor is not worth its digits
FEW_RUNS = 5  # below it Welch's interval leans hard on the logarithms being normal
LEAST_FOR_HALVES = 4  # runs of a base that can be set against itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One quantity of one cell. `ratio` is None where the values do not allow one."""

    quantity: Quantity
    base: Runs
    candidate: Runs
    ratio: Ratio | None
    itself: Ratio | None  # every other run of the base against the rest of it: the A/A pair
    void: bool  # the base differs from itself by as much as would have been called a difference
    more: MoreRuns | None  # None: enough were made, or it cannot be told
    verdict: str

    @property
    def interval(self) -> RatioInterval | None:
        return self.ratio.interval if self.ratio else None


def verdict(quantity: Quantity, base: Runs, candidate: Runs, threshold: float = THRESHOLD) -> Compared:
    """Judge one quantity by its values on either side, at least 1 each."""
    possible = _possible(quantity, base.values, candidate.values)
    ratio = compare_runs(base, candidate) if possible else None
    itself = compare_runs(*base.halves()) if possible and len(base.values) >= LEAST_FOR_HALVES else None
    void = itself is not None and _differs(itself.interval, threshold)
    more = _more(ratio, threshold) if ratio else None
    if ratio is None:
        words = _why_none(quantity, base.values, candidate.values)
    else:
        words = _judge(
            quantity, ratio, (len(base.values), len(candidate.values)), threshold, _asked(ratio, more, base, candidate)
        )
    if itself and void:
        words = f"void: base differs from itself ({_span(itself.interval)} between every other run and the rest)"
    return Compared(
        quantity=quantity,
        base=base,
        candidate=candidate,
        ratio=ratio,
        itself=itself,
        void=void,
        more=more,
        verdict=words,
    )


def typical(quantity: Quantity, values: Sequence[float]) -> float:
    """Return the mean over runs; of a percentile the median, since percentiles of runs cannot be averaged."""
    return median(values) if quantity.is_percentile else fmean(values)


def percent(value: float) -> str:
    """Return a percentage's digits: whole from 10 on, one decimal below, and never a 0 for what is not 0."""
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1g}" if 0 < abs(value) < 0.05 else f"{value:.1f}".removesuffix(".0")


def signed_percent(ratio: float) -> str:
    change = (ratio - 1) * 100
    return f"{'+' if change > 0 else ''}{percent(change)}"


def interval_of(quantity: Quantity, base: Sequence[float], candidate: Sequence[float]) -> RatioInterval | None:
    """Return the ratio's interval, or None where the values allow none: too few, or one not above 0."""
    return ratio_interval(base, candidate) if _possible(quantity, base, candidate) else None


def _possible(quantity: Quantity, base: Sequence[float], candidate: Sequence[float]) -> bool:
    least = FEW_RUNS if quantity.is_percentile else 2
    return min(len(base), len(candidate)) >= least and min(*base, *candidate) > 0


def _within(interval: RatioInterval, threshold: float) -> bool:
    return 1 - threshold <= interval.low and interval.high <= 1 + threshold


def _differs(interval: RatioInterval, threshold: float) -> bool:
    return not _within(interval, threshold) and not interval.low <= 1 <= interval.high


def _more(ratio: Ratio, threshold: float) -> MoreRuns | None:
    """Return how many more runs would be enough, where the interval holds 1 and is too wide to tell the threshold."""
    holds = ratio.interval.low <= 1 <= ratio.interval.high
    if not holds or _within(ratio.interval, threshold) or ratio.half_width <= math.log1p(threshold):
        return None
    return more_runs(ratio.spreads, threshold)


def _asked(ratio: Ratio, more: MoreRuns | None, base: Runs, candidate: Runs) -> str:
    """Return what to measure so that the next verdict can say more."""
    if more is None:
        return ""
    own = [side.own_variance for side in (base, candidate) if side.own_variance is not None]
    between = [spread.std**2 for spread in ratio.spreads]
    longer = len(own) == len(between) == 2 and sum(own) >= sum(between) / 2
    return f"; underpowered: {more} of each side" + (", or longer ones," if longer else "")


def _judge(quantity: Quantity, ratio: Ratio, sizes: tuple[int, int], threshold: float, asked: str) -> str:
    interval = ratio.interval
    hint = "; few runs: treat as a hint" if min(sizes) < FEW_RUNS else ""
    numbers = f"95 %, {sizes[0]} {'pairs of' if ratio.paired else f'and {sizes[1]}'} runs"
    matters = f"{percent(threshold * 100)} %"
    if _within(interval, threshold):
        return f"same within {matters} ({numbers}){hint}"
    if _differs(interval, threshold):
        ends = sorted(abs(end - 1) * 100 for end in (interval.low, interval.high))
        word = _word(quantity, higher=interval.low > 1)
        return f"{word} by {percent(ends[0])} to {percent(ends[1])} % ({numbers}){hint}"
    wanted = f"{asked} to tell {matters}" if asked else ""
    return f"no evidence of a difference ({_span(interval)}; {numbers}){wanted}{hint}"


def _span(interval: RatioInterval) -> str:
    if interval.low < 1 / WIDE or interval.high > WIDE:
        return f"the interval is wider than a factor of {WIDE}, so nearly nothing is known"
    return f"{signed_percent(interval.low)} to {signed_percent(interval.high)} %"


def _word(quantity: Quantity, *, higher: bool) -> str:
    if quantity.higher_is_better is None:
        return "higher" if higher else "lower"
    return "faster" if higher == quantity.higher_is_better else "slower"


def _why_none(quantity: Quantity, base: Sequence[float], candidate: Sequence[float]) -> str:
    if min(*base, *candidate) <= 0:
        return "no ratio can be given: a value is 0 or less"
    change = f"{signed_percent(typical(quantity, candidate) / typical(quantity, base))} %"
    sizes = (len(base), len(candidate))
    if sizes == (1, 1):
        return (
            "one run each: their spread is unknown, so nothing can be said about the difference beyond these"
            f" two values: {change}"
        )
    if min(sizes) == 1:
        return (
            f"{sizes[0]} and {sizes[1]} runs: the spread of a single run is unknown, so nothing can be said"
            f" about the difference beyond these values: {change}"
        )
    return (
        f"{sizes[0]} and {sizes[1]} runs: too few for an interval of a percentile (it needs {FEW_RUNS} each): {change}"
    )
