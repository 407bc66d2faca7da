"""What one load generator found of a server, in the quantities that all of them are compared by. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from headrace.bench.stats import Distribution
from headrace.clock import NS_PER_S

Times = npt.NDArray[np.int64]
Basis = Literal["computed", "from schedule", "from send", "printed"]
LATENCIES = ("p50", "p90", "p99", "mean")


@dataclass(frozen=True, slots=True)
class Requests:
    """The moments of each request, in nanoseconds of any one clock, in order of sending; all were answered."""

    issued: Times
    completed: Times
    scheduled: Times | None = None  # None: the tool keeps no schedule
    samples: int = 1  # rows of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """What a tool says itself, in samples/s and seconds. None where it says nothing."""

    throughput: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one tool found. Latencies are in seconds; `from_schedule` and `from_send` are computed from its records."""

    tool: str
    requests: int = 0
    throughput: float | None = None  # samples answered / (last completed - first scheduled, or first issued)
    from_schedule: Distribution | None = None
    from_send: Distribution | None = None
    printed: Printed | None = None
    error: str | None = None  # why there are no numbers, or none that count
    own_cost: Distribution | None = None  # what our adapter adds to the tool's latency, in seconds
    facts: dict[str, str] = field(default_factory=dict)

    def value(self, basis: Basis, name: str) -> float | None:
        """Return one number: `name` is throughput, or one of LATENCIES."""
        if basis == "computed":
            return self.throughput if name == "throughput" else None
        if basis == "printed":
            return None if self.printed is None else getattr(self.printed, name)
        times = self.from_schedule if basis == "from schedule" else self.from_send
        return None if times is None or name == "throughput" else getattr(times, name)


def of_requests(
    tool: str, requests: Requests, *, printed: Printed | None = None, facts: Mapping[str, str] | None = None
) -> Found:
    """Compute by our definitions, whosever records they are."""
    count = len(requests.issued)
    if not count:
        return Found(tool=tool, printed=printed, error="it has no answered request", facts=dict(facts or {}))
    begin = requests.issued if requests.scheduled is None else requests.scheduled
    window_ns = int(requests.completed.max() - begin.min())
    return Found(
        tool=tool,
        requests=count,
        throughput=count * requests.samples * NS_PER_S / window_ns if window_ns > 0 else None,
        from_schedule=None if requests.scheduled is None else Distribution.of(requests.completed - requests.scheduled),
        from_send=Distribution.of(requests.completed - requests.issued),
        printed=printed,
        facts=dict(facts or {}),
    )
