"""Intervals for the ratio and the difference of two means whose spreads may differ.

Source: B. L. Welch, "The generalization of Student's problem when several different population variances are
involved", Biometrika 34 (1947), with the degrees of freedom of F. E. Satterthwaite, Biometrics Bulletin 2
(1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What a published table keeps of its runs."""

    mean: float
    std: float  # sample standard deviation, n - 1
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Take the moments of at least 2 values."""
        return cls(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), n=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioInterval:
    """Candidate over base, and where the true ratio lies at the stated confidence."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_digits(self.ratio)} ({_digits(self.low)} to {_digits(self.high)})"


def ratio_interval(base: Sequence[float], candidate: Sequence[float]) -> RatioInterval:
    """Return the ratio of the geometric means, candidate over base, with its 95 % interval.

    Welch's interval for the difference of the means of the logarithms, taken back by exp: times and rates
    spread in proportion to their size, and a ratio's interval may not cross 0. Callers guarantee at least 2
    values on either side, all above 0.
    """
    logs_base, logs_candidate = Moments.of(np.log(base).tolist()), Moments.of(np.log(candidate).tolist())
    return _taken_back(logs_candidate.mean - logs_base.mean, half_width((logs_base, logs_candidate)))


def logs_interval(differences: Moments) -> RatioInterval:
    """Return the ratio whose logarithm is the mean of paired differences, with Student's 95 % interval."""
    return _taken_back(differences.mean, half_width((differences,)))


def half_width(spreads: Sequence[Moments]) -> float:
    """Return how far the 95 % interval of a sum or difference of the means reaches to either side.

    Of one mean it is Student's; of two, Welch's.
    """
    return _standard_error(spreads) * _quantile(_degrees(spreads))


def detectable(spreads: Sequence[Moments], power: float) -> float:
    """Return how far apart two means must be for Welch's test at 5 % to tell them apart in a share `power` of trials.

    By the noncentral t distribution, one tail of it: that the test errs in the other direction is left out, which at a
    power of 0.8 is less than 1 in 100,000.
    """
    degrees = _degrees(spreads)
    return _standard_error(spreads) * float(nctdtrinc(degrees, 1 - power, _quantile(degrees)))


def p_value(base: Moments, candidate: Moments) -> float:
    """Return Welch's two-sided p for the hypothesis that both means are equal. Callers guarantee n >= 2."""
    error = _standard_error((base, candidate))
    if error == 0:
        return 1.0 if base.mean == candidate.mean else 0.0
    t = abs(candidate.mean - base.mean) / error
    return 2 * float(stdtr(_degrees((base, candidate)), -t))


def _standard_error(spreads: Sequence[Moments]) -> float:
    return math.sqrt(sum(spread.std**2 / spread.n for spread in spreads))


def _degrees(spreads: Sequence[Moments]) -> float:
    parts = [(spread.std**2 / spread.n, spread.n - 1) for spread in spreads]
    scale = sum(part**2 / free for part, free in parts)
    if scale == 0:  # no spread at all: the standard error is 0 and any value will do
        return sum(spread.n - 1 for spread in spreads)
    return sum(part for part, _ in parts) ** 2 / scale


def _quantile(degrees: float) -> float:
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def _taken_back(difference: float, half: float) -> RatioInterval:
    return RatioInterval(ratio=math.exp(difference), low=_exp(difference - half), high=_exp(difference + half))


def _exp(value: float) -> float:
    """Two runs that have little to do with each other can span more than a float holds."""
    return math.exp(value) if value < 700 else math.inf


def _digits(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 1000 else f"{ratio:.2g}"
