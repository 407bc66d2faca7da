"""The loads that more than one tool can make, each in the words of all of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from headrace.config import LoadConfig, require
from headrace.referee.loadgen_sut import Scenario

TRUTH, OURS, AGAIN, LOADGEN, PERF_ANALYZER, WAITING = (
    "truth",
    "headrace",
    "headrace, again",
    "mlcommons-loadgen",
    "perf_analyzer --async",
    "perf_analyzer --sync",
)
THRESHOLD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much of everything."""

    rate: float = 100.0  # requests/s of open loads
    concurrency: int = 8  # in flight in the closed loop
    samples: int = 8  # of a query of MultiStream: rows of one request
    duration_s: float = 10.0  # of each measurement
    seed: int = 0
    threshold: float = THRESHOLD  # ratios that differ from 1 by more are named

    def validate(self) -> None:
        require(self.rate > 0, f"--rate {self.rate:g}: must be above 0")
        require(self.concurrency >= 1, f"--concurrency {self.concurrency}: at least 1")
        require(self.samples >= 1, f"--samples {self.samples}: at least 1")
        require(self.duration_s > 0, f"--duration {self.duration_s:g}: must be above 0 s")
        require(self.threshold > 0, f"--threshold {self.threshold:g}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load, and which tools can make it."""

    name: str
    words: str
    load: LoadConfig
    samples: int = 1  # rows of a request
    scenario: Scenario | None = None  # of mlcommons-loadgen
    perf_analyzer: bool = True

    @property
    def folder(self) -> str:
        return self.name.lower().replace(" ", "-")

    @property
    def is_open(self) -> bool:
        return self.load.kind in ("poisson", "replay")

    def replayed(self, arrivals: Path) -> Case:
        """Return the same load with a plan that another tool has made."""
        return replace(self, load=LoadConfig(kind="replay", arrivals=arrivals, seed=self.load.seed))


def cases(settings: Settings) -> tuple[Case, ...]:
    """Return every load in order; `settings` have been validated."""
    one = LoadConfig(kind="closed", concurrency=1, duration_s=settings.duration_s)
    many = max(1, round(settings.rate * settings.duration_s))
    return (
        Case(name="SingleStream", words="one request at a time", load=one, scenario="SingleStream"),
        Case(
            name="MultiStream",
            words=f"one request of {settings.samples} rows at a time",
            load=one,
            samples=settings.samples,
            scenario="MultiStream",
        ),
        Case(
            name="Server",
            words=f"Poisson arrivals at {settings.rate:g} requests/s, the same moments for every tool",
            load=LoadConfig(kind="poisson", rate=settings.rate, duration_s=settings.duration_s, seed=settings.seed),
            scenario="Server",
        ),
        Case(
            name="Offline",
            words=f"{many} requests, all due at once",
            load=LoadConfig(kind="burst", num_iters=many),
            scenario="Offline",
            perf_analyzer=False,
        ),
        Case(
            name="Closed loop",
            words=f"{settings.concurrency} requests in flight",
            load=LoadConfig(kind="closed", concurrency=settings.concurrency, duration_s=settings.duration_s),
        ),
    )
