"""What may be said of two sets of runs: a ratio with its interval, and words that claim no more than it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from headrace.study.quantities import Quantity
from headrace.study.welch import RatioInterval, ratio_interval

THRESHOLD = 0.02  # a ratio within 1 +- this matters to nobody
WIDE = 10  # a ratio known no better than within this factor is not worth its digits
FEW_RUNS = 5  # below it Welch's interval leans hard on the logarithms being normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One quantity of one cell. `interval` is None where the values do not allow one."""

    quantity: Quantity
    base: tuple[float, ...]
    candidate: tuple[float, ...]
    interval: RatioInterval | None
    verdict: str


def verdict(
    quantity: Quantity, base: Sequence[float], candidate: Sequence[float], threshold: float = THRESHOLD
) -> Compared:
    """Judge one quantity by its values on either side, at least 1 each."""
    interval = interval_of(quantity, base, candidate)
    words = _judge(quantity, base, candidate, interval, threshold)
    return Compared(quantity=quantity, base=tuple(base), candidate=tuple(candidate), interval=interval, verdict=words)


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
    least = FEW_RUNS if quantity.is_percentile else 2
    if min(len(base), len(candidate)) < least or min(*base, *candidate) <= 0:
        return None
    return ratio_interval(base, candidate)


def _judge(
    quantity: Quantity,
    base: Sequence[float],
    candidate: Sequence[float],
    interval: RatioInterval | None,
    threshold: float,
) -> str:
    if interval is None:
        return _why_none(quantity, base, candidate)
    few = min(len(base), len(candidate)) < FEW_RUNS
    hint = "; few runs: treat as a hint" if few else ""
    numbers = f"95 %, {len(base)} and {len(candidate)} runs"
    if 1 - threshold <= interval.low and interval.high <= 1 + threshold:
        return f"no difference that matters (within {percent(threshold * 100)} %; {numbers}){hint}"
    if interval.low <= 1 <= interval.high:
        span = f"{signed_percent(interval.low)} to {signed_percent(interval.high)} %"
        if interval.low < 1 / WIDE or interval.high > WIDE:
            span = f"the interval is wider than a factor of {WIDE}, so nearly nothing is known"
        return f"no evidence of a difference ({span}; {numbers}){hint}"
    ends = sorted(abs(end - 1) * 100 for end in (interval.low, interval.high))
    word = _word(quantity, higher=interval.low > 1)
    return f"{word} by {percent(ends[0])} to {percent(ends[1])} % ({numbers}){hint}"


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
