"""The highest rate that holds a latency bound: which runs are made, in which order, until when.

What they say is `search.capacity_report`'s, which needs nothing but their folders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headrace.clock import NS_PER_S, Clock, now_ns
from headrace.config import LoadConfig, require
from headrace.search.bisection import Bisection
from headrace.search.holds import SHARE, Bound, RateVerdict, judge_rate, share_limits
from headrace.search.trial import Kind, Trial, trial_name

ALONE_S = 3.0  # one request at a time, for so long at most
SATURATED_S = 5.0  # as many as can be in flight, likewise
RECENT = 3  # runs that say how long the next one takes: the first of all also prepares what others share
LEVELS = (50, 70, 80, 90)  # percent of the capacity

Measure = Callable[[str, LoadConfig], Trial]


class Watcher(Protocol):
    """Shows a search to whoever waits for it."""

    def step(self, text: str, left_s: float) -> None:
        """A run begins; so much is left of the time."""

    def found(self, text: str) -> None:
        """What a run, or all runs at a rate, have shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How the capacity is searched for."""

    bound: Bound
    duration_s: float = 10.0  # of each run
    level_duration_s: float = 30.0  # of the runs at a share of the capacity
    repeats: int = 3  # runs of a rate at most, until its verdict is clear
    resolution: float = 0.05  # of the highest rate that holds, to the lowest that does not
    time_s: float = 600.0  # in all; what is known by then is the result
    in_flight: int = 64  # requests, to see how much can be done at most
    seed: int = 0

    def validate(self) -> None:
        self.bound.validate()
        require(self.duration_s > 0, f"--duration {self.duration_s:g}s: must be above 0")
        require(self.level_duration_s > 0, f"--level-duration {self.level_duration_s:g}s: must be above 0")
        require(self.repeats >= 1, f"--repeats {self.repeats}: at least 1 run must be made at a rate")
        require(0.001 <= self.resolution <= 1, f"--resolution {self.resolution:g}: must be 0.001 to 1")
        require(self.in_flight >= 1, f"--in-flight {self.in_flight}: at least 1 request must be under way")
        least = min(ALONE_S, self.duration_s) + min(SATURATED_S, self.duration_s) + self.duration_s
        require(
            self.time_s >= least,
            f"--time {self.time_s:g}s: too short for a single rate; it takes {least:g}s at --duration"
            f" {self.duration_s:g}s, and what the runs take to start",
        )


class OutOfTimeError(Exception):
    """The next run would not fit into the time that is left. Never seen by users."""


class Budget:
    """The time that a search may take, and how much longer than its load a run takes to start and to end."""

    def __init__(self, time_s: float, clock: Clock = now_ns) -> None:
        self._clock = clock
        self._end_ns = clock() + int(time_s * NS_PER_S)
        self._overheads_s: deque[float] = deque(maxlen=RECENT)

    @property
    def left_s(self) -> float:
        return (self._end_ns - self._clock()) / NS_PER_S

    def cost_s(self, duration_s: float) -> float:
        """Estimate how long a run takes in all."""
        return duration_s + max(self._overheads_s, default=0.0)

    def require(self, duration_s: float) -> None:
        """Raise OutOfTimeError where another run of so long does not fit."""
        if self.cost_s(duration_s) > self.left_s:
            raise OutOfTimeError

    def spent(self, duration_s: float, began_ns: int) -> None:
        """Learn from a run that began then."""
        self._overheads_s.append(max(0.0, (self._clock() - began_ns) / NS_PER_S - duration_s))

    def now_ns(self) -> int:
        return self._clock()


@dataclass(slots=True)
class Search:
    """A search under way. `trials` are all runs made."""

    config: SearchConfig
    measure: Measure
    watcher: Watcher
    budget: Budget
    trials: list[Trial] = field(default_factory=list)
    reserved_s: float = 0.0  # of the time, for what comes after

    def run(self) -> tuple[Trial, ...]:
        """Make the runs, as many as the time allows, and return them."""
        try:
            self._run()
        except OutOfTimeError:
            self.watcher.found("the time is used up; what is known by now is the result")
        return tuple(self.trials)

    def _run(self) -> None:
        config = self.config
        alone = self.closed("alone", 1, ALONE_S)
        if never_holds(alone, config.bound):
            self.watcher.found("one request alone takes longer than the bound")
            return
        saturated = self.closed("saturated", config.in_flight, SATURATED_S)
        if not saturated.rate:
            return
        levels = len(LEVELS) * self.budget.cost_s(config.level_duration_s)
        self.reserved_s = levels if levels < self.budget.left_s / 2 else 0.0
        capacity = self.bisect(Bisection(max(saturated.rate, alone.rate), config.resolution))
        self.reserved_s = 0.0
        if capacity is not None:
            self._levels(capacity)

    def closed(self, kind: Kind, in_flight: int, longest_s: float) -> Trial:
        """Run a closed loop."""
        duration_s = min(longest_s, self.config.duration_s)
        load = LoadConfig(kind="closed", concurrency=in_flight, duration_s=duration_s)
        words = "one request at a time" if kind == "alone" else f"{in_flight} requests in flight"
        trial = self._measure(kind, "", load, words)
        self.watcher.found(f"{words}: {trial.rate:,.4g} requests/s")
        return trial

    def bisect(self, bisection: Bisection) -> float | None:
        """Return the highest rate that holds, tried as often as allowed; None where none does, or time ended first."""
        try:
            while True:
                rate = bisection.next()
                if rate is not None:
                    bisection.tell(rate, holds=self.ask(rate, until_clear=True).holds)
                elif bisection.held is None:
                    return None
                elif self.ask(bisection.held, until_clear=False).holds:
                    return bisection.held
                else:
                    bisection.tell(bisection.held, holds=False)
        except OutOfTimeError:
            self.watcher.found("the time for the search is used up")
            return bisection.held

    def ask(self, rate: float, *, until_clear: bool) -> RateVerdict:
        """Repeat a rate, with other arrivals each time, until its verdict is clear or it has had all its runs."""
        while True:
            made = self.at(rate)
            if made:
                verdict = judge_rate(rate, made, self.config.bound)
                if self._enough(verdict) or (until_clear and verdict.clear):
                    self.watcher.found(told(verdict))
                    return verdict
            words = f"{rate:,.4g} requests/s, run {len(made) + 1}"
            self._open("rate", f"{rate:.4g}-{len(made) + 1}", rate, words)

    def _enough(self, verdict: RateVerdict) -> bool:
        """Tell whether a rate has had all its runs; twice as many where the client was late."""
        counted = 0 if verdict.limit == "client" else verdict.trials - verdict.left_out
        return counted >= self.config.repeats or verdict.trials >= 2 * self.config.repeats

    def at(self, rate: float) -> list[Trial]:
        """Return the runs of the search at this rate."""
        return [trial for trial in self.trials if trial.kind == "rate" and trial.rate == rate]

    def _levels(self, capacity: float) -> None:
        for percent in LEVELS:
            rate = capacity * percent / 100
            trial = self._open("level", str(percent), rate, f"{percent} % of it, {rate:,.4g} requests/s")
            verdict = judge_rate(rate, [trial], self.config.bound)
            self.watcher.found(f"{percent} % of it, {rate:,.4g} requests/s: {verdict.reason}")

    def _open(self, kind: Kind, detail: str, rate: float, words: str) -> Trial:
        duration_s = self.config.level_duration_s if kind == "level" else self.config.duration_s
        seed = self.config.seed + len(self.trials)
        load = LoadConfig(kind="poisson", rate=rate, duration_s=duration_s, seed=seed, bound_s=self.config.bound.p99_s)
        return self._measure(kind, detail, load, words)

    def _measure(self, kind: Kind, detail: str, load: LoadConfig, words: str) -> Trial:
        duration_s = load.duration_s or 0.0
        self.budget.require(duration_s + self.reserved_s)
        self.watcher.step(words, self.budget.left_s)
        began_ns = self.budget.now_ns()
        trial = self.measure(trial_name(len(self.trials), kind, detail), load)
        self.budget.spent(duration_s, began_ns)
        self.trials.append(trial)
        return trial


def never_holds(alone: Trial, bound: Bound) -> bool:
    """Tell whether requests that wait for no other are beyond the bound too often, for sure."""
    return not alone.failed and share_limits([alone], bound.p99_s)[0] > SHARE


def told(verdict: RateVerdict) -> str:
    """Say what a rate's trials have shown, in a line."""
    word = "holds" if verdict.holds else "does not hold"
    runs = "1 run" if verdict.trials == 1 else f"{verdict.trials} runs"
    return f"{verdict.rate:,.4g} requests/s: {word} ({verdict.reason}; {runs}{'' if verdict.clear else ', not clear'})"


def by_rate(trials: Sequence[Trial]) -> dict[float, list[Trial]]:
    """Return the trials of the search by their rate, ascending."""
    rates: dict[float, list[Trial]] = {}
    for trial in sorted((each for each in trials if each.kind == "rate"), key=lambda each: each.rate):
        rates.setdefault(trial.rate, []).append(trial)
    return rates
