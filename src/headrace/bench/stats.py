"""Metrics of a run, as pure functions of its records.

Definitions (response time, service time, throughput, warm-up latency) follow the published experiment where it was
right: throughput is samples answered over (last completed - first scheduled), measured requests only. Percentiles are
of all values, linear interpolation between order statistics (numpy's "linear", Hyndman and Fan's type 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.bench.record import PHASES, STATUSES, Records, measured
from headrace.clock import NS_PER_S

OK = STATUSES.index("ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Seconds."""

    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, nanoseconds: npt.NDArray[np.int64]) -> Distribution:
        """Summarise at least one value. The mean is taken in float64: a sum of int64 nanoseconds can overflow."""
        values = nanoseconds.astype(np.float64) / NS_PER_S
        p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
        return cls(
            mean=float(values.mean()),
            min=float(values.min()),
            p50=float(p50),
            p90=float(p90),
            p95=float(p95),
            p99=float(p99),
            max=float(values.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What a run showed. None where the run does not say: no answers, or answers with errors among them."""

    requests: int  # measured ones
    rows: int  # answered rightly
    errors: int
    wrong: int
    unanswered: int
    shed: int = 0  # refused for want of room
    warmup_latency_s: float | None  # first response - first request
    window_s: float | None  # last completed - first scheduled
    throughput_samples_per_s: float | None
    response_time: Distribution | None  # completed - scheduled
    service_time: Distribution | None  # completed - issued
    issue_delay: Distribution | None  # issued - scheduled
    goodput_samples_per_s: float | None = (
        None  # samples answered rightly within the bound / window; None without a bound
    )


def window_ns(records: Records) -> tuple[int, int] | None:
    """Return (first scheduled, last completed) of the measured requests, or None if none was answered."""
    answered = measured(records)
    answered = answered[answered["completed_ns"] > 0]
    if not len(answered):
        return None
    return int(measured(records)["scheduled_ns"].min()), int(answered["completed_ns"].max())


def warmup_latency_s(records: Records) -> float | None:
    first = records[records["phase"] == PHASES.index("first")]
    if not len(first) or first["status"][0] != OK:
        return None
    return float(first["completed_ns"][0] - first["issued_ns"][0]) / NS_PER_S


def compute(records: Records, bound_s: float | None = None) -> Metrics:
    """Compute every metric. A run with an error, a wrong or a missing answer has no throughput and no latency.

    It may have a goodput: that counts right answers within `bound_s` after they were due, and nothing else.
    """
    counted = measured(records)
    counts = {name: int((counted["status"] == code).sum()) for code, name in enumerate(STATUSES)}
    window = window_ns(records)
    window_s = (window[1] - window[0]) / NS_PER_S if window else None
    clean = len(counted) > 0 and counts["ok"] == len(counted)
    rows = int(counted["rows"][counted["status"] == OK].sum())
    completed, scheduled, issued = counted["completed_ns"], counted["scheduled_ns"], counted["issued_ns"]
    return Metrics(
        requests=len(counted),
        rows=rows,
        errors=counts["error"],
        wrong=counts["wrong"],
        unanswered=counts["unanswered"],
        shed=counts["shed"],
        warmup_latency_s=warmup_latency_s(records),
        window_s=window_s,
        throughput_samples_per_s=rows / window_s if clean and window_s else None,
        response_time=Distribution.of(completed - scheduled) if clean else None,
        service_time=Distribution.of(completed - issued) if clean else None,
        issue_delay=Distribution.of(issued - scheduled) if clean else None,
        goodput_samples_per_s=_goodput(counted, bound_s, window_s),
    )


def _goodput(counted: Records, bound_s: float | None, window_s: float | None) -> float | None:
    if bound_s is None or not window_s:
        return None
    in_time = counted["completed_ns"] - counted["scheduled_ns"] <= bound_s * NS_PER_S
    return float(counted["rows"][in_time & (counted["status"] == OK)].sum()) / window_s
