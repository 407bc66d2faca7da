"""Does a run count? Reasons why it does not, and what a reader must be told about it, as pure functions of its records.

A reason is a sentence with the value and the limit. No reason: nothing was found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headrace.bench.calibration import Calibration
from headrace.bench.record import STATUSES, Records, measured
from headrace.bench.stats import Distribution, Metrics, compute
from headrace.clock import NS_PER_S
from headrace.config import OPEN_LOADS, LoadConfig

LITTLE_TOLERANCE = 0.01
SHARE_OF_CEILING = 0.5
TIMES_OWN_P99 = 5.0
LATE_SHARE = 0.05  # of the median response time: an issue delay that no longer goes unseen,
LATE_S = 1e-3  # and one that is late whatever the server does
GROWTH_SHARE = 0.04  # of the requests sent: a backlog that grows by more is not chance,
GROWTH_LEAST = 10.0  # in requests
STAGES = ("issued_ns", "received_ns", "started_ns", "computed_ns", "responded_ns", "completed_ns")

Moments = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Verdict:
    voids: tuple[str, ...] = ()  # the run does not count
    marks: tuple[str, ...] = ()  # it counts, and a reader must know
    overload: str = ""  # why no latency exists: the backlog grew; it is one of the marks


@dataclass(frozen=True, slots=True)
class Judged:
    """A run's metrics as they may be shown: where no latency exists, response and service time are None."""

    metrics: Metrics
    verdict: Verdict


def conserved(metrics: Metrics, answered_rightly: int) -> list[str]:
    """Every request that was issued was answered, failed, was refused, or got no answer: nothing is lost between."""
    ended = answered_rightly + metrics.wrong + metrics.errors + metrics.shed + metrics.unanswered
    if ended == metrics.requests:
        return []
    return [f"{metrics.requests} requests were issued and {ended} ended; counts are not conserved"]


def server_counts(client_answered: int, server_answered: int | None) -> list[str]:
    """The server counted as many answers as arrived here."""
    if server_answered is None or server_answered == client_answered:
        return []
    return [
        f"the server counted {server_answered} answers and {client_answered} arrived; another client, or a count"
        " that is wrong"
    ]


def ordered(records: Records) -> list[str]:
    """No request that was answered was sent before it was due, or answered before it was sent; its stages are in order.

    Stages of one request that follow each other sum to its latency. 0 stands for a stage that was not reached.
    """
    answered = records[records["completed_ns"] > 0]
    early = int((answered["issued_ns"] < answered["scheduled_ns"]).sum())
    reasons = [f"{early} requests were sent before they were due"] if early else []
    last = answered["issued_ns"].astype(np.int64)
    for name in STAGES[1:]:
        if name not in (answered.dtype.names or ()):
            continue
        reached = answered[name] > 0
        back = int((answered[name][reached] < last[reached]).sum())
        if back:
            reasons.append(f"{back} requests have {name} before the stage in front of it; stages do not sum to latency")
        last = np.where(reached, answered[name], last)
    return reasons


def mean_between(name: str, times: Distribution | None) -> list[str]:
    """A mean lies between the smallest and the largest value; one famous log printed 24 s where p50 was 335."""
    if times is None or (times.min <= times.mean * (1 + 1e-9) and times.mean <= times.max * (1 + 1e-9)):
        return []
    return [f"the mean {name} is {times.mean:g} s, outside of {times.min:g} to {times.max:g} s"]


def little(issued: Moments, completed: Moments, mean_s: float | None) -> list[str]:
    """Little's law: mean number in flight = rate * mean time, the first found by integrating over the run.

    Takes the answered requests, each at one place of both arrays, and the mean service time that is reported of them.
    """
    if len(issued) < 2 or mean_s is None:
        return []
    moments = np.concatenate([issued, completed])
    steps = np.concatenate([np.ones(len(issued)), -np.ones(len(completed))])
    order = np.argsort(moments, kind="stable")
    span_ns = float(moments[order[-1]] - moments[order[0]])
    if span_ns <= 0:
        return [f"{len(issued)} requests took no time together"]
    in_flight = np.cumsum(steps[order])[:-1]
    number = float((in_flight * np.diff(moments[order])).sum()) / span_ns
    expected = len(issued) / span_ns * mean_s * NS_PER_S
    if abs(number - expected) <= LITTLE_TOLERANCE * max(number, expected):
        return []
    return [f"Little's law does not hold: {number:.4g} in flight on average, rate times mean time is {expected:.4g}"]


def backlog(scheduled: Moments, completed: Moments) -> list[str]:
    """Under open load, the number of requests in the system does not grow from quarter to quarter of the run.

    Where it does, what is measured is how long the run was: no latency exists. 0 as `completed` stands for no answer.

    `steady.is_steady` asks the same of response times, and neither can do the other's work. This one takes a run's
    latencies away, so it must seldom be wrong, must count requests that got no answer, and must see gross overload in
    a run of 40 requests. `is_steady` only warns, so it may be wrong more often, and sees slighter overload.
    `benchmarks/coverage.py` measures both on the same queues.
    """
    count = len(scheduled)
    if count < 40:
        return []
    ends = np.sort(np.where(completed > 0, completed, np.iinfo(np.int64).max))
    inside = np.arange(1, count + 1) - np.searchsorted(ends, np.sort(scheduled), side="right")
    means = [float(quarter.mean()) for quarter in np.array_split(inside, 4)]
    growth = means[-1] - means[0]
    if any(np.diff(means) <= 0) or growth <= max(GROWTH_LEAST, GROWTH_SHARE * count * 0.75):
        return []
    numbers = ", ".join(f"{mean:.0f}" for mean in means)
    return [
        f"the backlog grew all through the run ({numbers} requests in its quarters): the server answers fewer than are"
        " sent, and no latency exists; lower --rate"
    ]


def slip(issue_delay: Distribution | None, response: Distribution | None) -> list[str]:
    """Requests were sent when they were due, or near enough to it."""
    if issue_delay is None or response is None:
        return []
    limit_s = max(LATE_S, LATE_SHARE * response.p50)
    if issue_delay.p99 <= limit_s:
        return []
    return [
        f"the client was late: issue delay p99 {issue_delay.p99 * 1e3:.3g} ms, of {limit_s * 1e3:.3g} that go unseen,"
        f" and {issue_delay.max * 1e3:.3g} ms at most; response time counts it, service time leaves it out"
    ]


def client_limited(
    rate: float | None, response: Distribution | None, payload_bytes: float, calibration: Calibration | None
) -> list[str]:
    """The harness was not the limit: half of what it can do is enough, and its own latency is small beside the rest."""
    if calibration is None:
        return ["not calibrated on this machine: what the harness adds is unknown; run headrace calibrate"]
    own = calibration.ceiling(payload_bytes)
    reasons = [] if calibration.warning is None else [f"calibrated on a busy machine: {calibration.warning}"]
    if rate is not None and rate > SHARE_OF_CEILING * own.requests_per_s:
        reasons.append(
            f"client-limited: {rate:,.0f} requests/s are {rate / own.requests_per_s:.0%} of the"
            f" {own.requests_per_s:,.0f} that the harness reaches here with such payloads"
        )
    if response is not None and response.p99 < TIMES_OWN_P99 * own.p99_s:
        reasons.append(
            f"client-limited: p99 {response.p99 * 1e3:.3g} ms is less than {TIMES_OWN_P99:g} times the harness's own,"
            f" {own.p99_s * 1e3:.3g} ms"
        )
    return reasons


def judge(records: Records, load: LoadConfig, server_answered: int | None = None) -> Judged:
    """Compute a run's metrics and say whether it counts, from its records and the server's count where there is one.

    Whatever shows, compares or searches by a run's numbers asks here, so that all of them agree on which exist.
    """
    metrics = compute(records, load.bound_s)
    verdict = _verdict(measured(records), metrics, is_open=load.kind in OPEN_LOADS, server_answered=server_answered)
    if verdict.overload:
        metrics = replace(metrics, response_time=None, service_time=None)  # they say how long the run was
    return Judged(metrics, verdict)


def _verdict(records: Records, metrics: Metrics, *, is_open: bool, server_answered: int | None) -> Verdict:
    right = records["status"] == STATUSES.index("ok")
    wrong = records["status"] == STATUSES.index("wrong")
    answered = records[right | wrong]
    mean_s = None if metrics.service_time is None else metrics.service_time.mean
    voids = [
        *conserved(metrics, int(right.sum())),
        *server_counts(len(answered), server_answered),
        *ordered(records),
        *mean_between("response time", metrics.response_time),
        *mean_between("service time", metrics.service_time),
        *little(answered["issued_ns"], answered["completed_ns"], mean_s),
    ]
    if not is_open:
        return Verdict(tuple(voids))
    grew = backlog(records["scheduled_ns"], records["completed_ns"])
    marks = (*grew, *slip(metrics.issue_delay, metrics.response_time))
    return Verdict(tuple(voids), marks, overload="".join(grew))


def requests_per_s(metrics: Metrics) -> float | None:
    """Return the rate of all measured requests, answered or not."""
    return metrics.requests / metrics.window_s if metrics.window_s else None
