"""Does a rate hold the bound? Decided from all requests of all its trials, and how clear that is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betaincinv

from headrace.errors import InvalidOption
from headrace.search.trial import Trial, pooled

SHARE = 0.01  # of the requests may be answered after the bound: that is what p99 <= bound means
SURE = 0.95  # one-sided: so sure that more, or no more, than that share are

Limit = Literal["server", "client"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """p99 of the response time, over all requests, must be no more than `p99_s`."""

    p99_s: float
    allow_shed: float = 0.0  # share of requests that may be refused

    def validate(self) -> None:
        if not 0 < self.p99_s < float("inf"):
            raise InvalidOption(f"--p99 {self.p99_s:g}s: must be above 0, and finite")
        if not 0 <= self.allow_shed < 1:
            raise InvalidOption(f"--allow-shed {self.allow_shed:g}: give a share of the requests, from 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateVerdict:
    """What the trials at one rate say together."""

    rate: float  # requests/s
    holds: bool
    clear: bool  # another trial would hardly change it
    reason: str
    limit: Limit = "server"  # who is to blame where it does not hold
    trials: int
    left_out: int  # of them, since the client was late
    requests: int
    p50_s: float | None
    p99_s: float | None
    beyond: float  # share of the answered requests beyond the bound,
    least_beyond: float  # and where the true share lies, each with `SURE`
    most_beyond: float


def judge_rate(rate: float, trials: Sequence[Trial], bound: Bound) -> RateVerdict:
    """Judge the trials at one rate, at least 1.

    It holds if no request failed, no more were refused than may be, p99 of all response times together is within the
    bound, and the backlog did not grow in most of the trials. Trials whose client was late do not count against a rate:
    its fault may be theirs. They count for it, since requests that arrive late are answered no earlier than they would
    have been (Lindley's recursion grows with every arrival), and response time is from when they were due.

    It is clear where the share of requests beyond the bound lies on one side of 1 % for sure: by the limits of Clopper
    and Pearson (Biometrika 26, 1934), with as many requests as the correlated ones are worth (`Trial.worth`).
    """
    counted = trials
    if not _keeps(trials, bound):
        counted = [trial for trial in trials if not trial.late] or trials
    times = pooled(counted)
    limits = share_limits(counted, bound.p99_s)
    finding = _decide(trials, counted, bound, limits)
    p50, p99 = np.percentile(times, [50, 99]).tolist() if len(times) else (None, None)
    return RateVerdict(
        rate=rate,
        holds=finding.holds,
        clear=finding.clear,
        reason=finding.reason,
        limit=finding.limit,
        trials=len(trials),
        left_out=len(trials) - len(counted),
        requests=sum(trial.requests for trial in counted),
        p50_s=p50,
        p99_s=p99,
        beyond=float((times > bound.p99_s).mean()) if len(times) else 1.0,
        least_beyond=limits[0],
        most_beyond=limits[1],
    )


def share_limits(trials: Sequence[Trial], bound_s: float) -> tuple[float, float]:
    """Return the limits, each one-sided with `SURE`, of the true share of requests beyond the bound."""
    worth = sum(trial.worth(bound_s) for trial in trials)
    answered = sum(len(trial.response_s) for trial in trials)
    if not answered:
        return 0.0, 1.0
    count = worth * sum(trial.beyond(bound_s) for trial in trials) / answered
    least = float(betaincinv(count, worth - count + 1, 1 - SURE)) if count > 0 else 0.0
    most = float(betaincinv(count + 1, worth - count, SURE)) if count < worth else 1.0
    return least, most


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    holds: bool
    clear: bool
    reason: str
    limit: Limit = "server"


def _decide(trials: Sequence[Trial], counted: Sequence[Trial], bound: Bound, shares: tuple[float, float]) -> _Finding:
    requests = sum(trial.requests for trial in trials)
    failed, refused = sum(trial.failed for trial in trials), sum(trial.refused for trial in trials)
    if failed or not len(pooled(trials)):
        return _Finding(holds=False, clear=True, reason=f"{failed} of {requests} requests failed")
    if refused > bound.allow_shed * requests:
        return _Finding(holds=False, clear=True, reason=f"{refused} of {requests} requests were refused")
    reason = _p99_words(counted, bound)
    if len(counted) < len(trials):
        reason += f"; left out, since the client was late: {len(trials) - len(counted)} of {len(trials)} runs"
    unsteady = [trial.unsteady for trial in counted if trial.unsteady]
    if _keeps(counted, bound):
        return _Finding(holds=True, clear=shares[1] <= SHARE and not unsteady, reason=reason)
    late = [trial.late for trial in counted if trial.late]
    if late:
        return _Finding(holds=False, clear=False, limit="client", reason=late[0])
    if _within(counted, bound):
        return _Finding(holds=False, clear=len(counted) > 1, reason=unsteady[0])
    return _Finding(holds=False, clear=shares[0] > SHARE, reason=reason)


def _keeps(trials: Sequence[Trial], bound: Bound) -> bool:
    return _within(trials, bound) and 2 * sum(bool(trial.unsteady) for trial in trials) <= len(trials)


def _within(trials: Sequence[Trial], bound: Bound) -> bool:
    times = pooled(trials)
    return len(times) > 0 and float(np.percentile(times, 99)) <= bound.p99_s


def _p99_words(trials: Sequence[Trial], bound: Bound) -> str:
    return f"p99 {milliseconds(float(np.percentile(pooled(trials), 99)))} of {milliseconds(bound.p99_s)}"


def milliseconds(seconds: float) -> str:
    """Say a time in ms, three digits."""
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
