"""Intervals: for the ratio of two sides' runs, and for a percentile of one run.

Two sides are compared by one value per run, since a run is a fresh process and the only thing that was repeated: the
spread between runs contains what differs between processes and what a run of this length leaves to chance. What else
was tried, and why it was not taken, is measured by `benchmarks/coverage.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri, stdtrit

from headrace.bench.correlation import correlation_time, variance_of_mean
from headrace.errors import InvalidOption
from headrace.study.welch import CONFIDENCE, Moments, RatioInterval, logs_interval, ratio_interval

PAIRED_BELOW = 0.6  # of the unpaired width. Taking whichever is narrower would cover 93 % at 5 runs, this covers 94
PAIRED_RUNS = 5
BATCHES = 16  # Schmeiser, Operations Research 30 (1982): between 10 and 30
INDEPENDENT = 1000  # requests' worth of independent values that a run needs before its p99 has an interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """One side's values, one per run, all above 0."""

    values: tuple[float, ...]
    repeats: tuple[int | None, ...] = ()  # the block of a sweep that each run belongs to; empty: not known
    own_variance: float | None = None  # mean over the runs of `own_variance`; None: not known

    def paired_with(self, other: Runs) -> Runs | None:
        """Return the other's values in the order of these runs' blocks; None where the blocks are not the same."""
        ours, theirs = set(self.repeats), set(other.repeats)
        whole = len(ours) == len(self.values) and len(theirs) == len(other.values)
        if not whole or ours != theirs or None in ours:
            return None
        by_repeat = dict(zip(other.repeats, other.values, strict=True))
        return Runs(values=tuple(by_repeat[repeat] for repeat in self.repeats), repeats=self.repeats)

    def halves(self) -> tuple[Runs, Runs]:
        """Return every other run, in the order of their blocks where that is known, and the rest."""
        order = list(range(len(self.values)))
        if None not in self.repeats:
            order = [index for _, index in sorted(zip(self.repeats, order, strict=False))] or order
        first, second = order[::2], order[1::2]
        return self._of(first), self._of(second)

    def _of(self, indices: Sequence[int]) -> Runs:
        repeats = tuple(self.repeats[index] for index in indices) if self.repeats else ()
        return Runs(values=tuple(self.values[index] for index in indices), repeats=repeats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio's interval, and the spreads of logarithms that it follows from: one per side, or one of the pairs."""

    interval: RatioInterval
    spreads: tuple[Moments, ...]

    @property
    def paired(self) -> bool:
        return len(self.spreads) == 1

    @property
    def half_width(self) -> float:
        """Of the logarithm."""
        return math.log(self.interval.high / self.interval.ratio) if self.interval.high < math.inf else math.inf


def compare_runs(base: Runs, candidate: Runs) -> Ratio:
    """Return the ratio of the geometric means over runs, candidate over base, with its 95 % interval.

    Welch's interval on the logarithms. Where both sides have a run in each of the same 5 blocks or more, and the
    interval of the pairs' differences (Student's) is clearly the narrower, that one. Callers give at least 2 runs each.
    """
    logs_base, logs_candidate = np.log(base.values), np.log(candidate.values)
    spreads = (Moments.of(logs_base.tolist()), Moments.of(logs_candidate.tolist()))
    plain = Ratio(interval=ratio_interval(base.values, candidate.values), spreads=spreads)
    matched = base.paired_with(candidate)
    if matched is None or len(base.values) < PAIRED_RUNS:
        return plain
    differences = Moments.of((np.log(matched.values) - logs_base).tolist())
    paired = Ratio(interval=logs_interval(differences), spreads=(differences,))
    return paired if paired.half_width < PAIRED_BELOW * plain.half_width else plain


@dataclass(frozen=True, slots=True, kw_only=True)
class PercentileInterval:
    """A percentile of one run and where that process's true one lies at 95 %, in the unit of the values."""

    value: float
    low: float
    high: float


def percentile_interval(values: npt.NDArray[np.float64], percentile: float) -> PercentileInterval:
    """Bound a percentile (0 to 100) of one run's response times, given in time order.

    The share of values below the percentile is averaged over 16 batches of successive requests, whose spread gives the
    number of independent values that they are worth, and with it the exact binomial (Clopper and Pearson's) limits of
    that share; the values at those shares are the limits. It speaks of this process alone: another one may differ.

    Sources: R. S. Woodruff, "Confidence intervals for medians and other position measures", Journal of the American
    Statistical Association 47 (1952); E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small
    expected number of positive counts estimated from survey data", Survey Methodology 24 (1998).

    Raises InvalidOption where the run is worth fewer than 10 independent values beyond the percentile: no method
    covers then. The length is judged by how far all response times depend on each other, and not by those beyond the
    percentile: a run that happens to have few of these would pass by it, and be wrong.
    """
    share = percentile / 100
    enough = INDEPENDENT * 0.01 / min(share, 1 - share)
    time = correlation_time(values)
    if len(values) < enough * time:
        raise InvalidOption(
            f"p{percentile:g} of {len(values)} requests: {time:.0f} successive ones are worth one, so an interval takes"
            f" about {enough * time:.0f}; measure longer"
        )
    value = float(np.percentile(values, percentile))
    batches = (values <= value)[: len(values) // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    variance = float(batches.var(ddof=1)) / BATCHES
    worth = min(share * (1 - share) / variance, len(values)) if variance > 0 else len(values)
    worth *= (float(ndtri(0.5 + CONFIDENCE / 2)) / float(stdtrit(BATCHES - 1, 0.5 + CONFIDENCE / 2))) ** 2
    below, tail = worth * share, (1 - CONFIDENCE) / 2
    shares = (betaincinv(below, worth - below + 1, tail), betaincinv(below + 1, worth - below, 1 - tail))
    low, high = np.quantile(values, shares)
    return PercentileInterval(value=value, low=float(low), high=float(high))


def own_variance(values: npt.NDArray[np.float64], percentile: float | None) -> float:
    """Estimate how much of a run's spread is its own: the variance of the logarithm of its mean or percentile.

    Of a percentile, by the slope of the values' quantiles around it. `values` are in time order, at least 100, above 0.
    """
    if percentile is None:
        return variance_of_mean(values) / float(values.mean()) ** 2
    share, value = percentile / 100, float(np.percentile(values, percentile))
    error = math.sqrt(variance_of_mean((values <= value).astype(np.float64)))
    low, high = np.quantile(values, np.clip((share - error, share + error), 0, 1))
    return float(math.log(high / low) / 2) ** 2
