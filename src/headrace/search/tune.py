"""The options that hold the most under a latency bound: which runs are made, and which options win.

Options are compared by their goodput at the highest rate that holds. Before that, a closed loop shows what they can do
at most: whoever does less than the best holds is given up for one run. Whoever may do more is first asked for the rate
that the best holds, and only then for more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from headrace.config import LoadConfig, require
from headrace.errors import DeviceUnavailable, HeadraceError, OutputError, RunFailed
from headrace.search.bisection import Bisection
from headrace.search.capacity import ALONE_S, Budget, OutOfTimeError, Watcher, never_holds
from headrace.search.finals import Finals, FinalsConfig, Races
from headrace.search.holds import Bound, judge_rate, milliseconds
from headrace.search.optimiser import Optimiser
from headrace.search.space import Choice, Space
from headrace.search.trial import Kind, Trial, trial_name

PROBES = 4  # rates of a set of options at most
NEAR = 0.1  # the highest rate that holds, to the lowest that does not
FINAL_SEEDS = 1_000_000  # of arrivals: none that the search has seen
SPARE = 1.02  # a closed loop's rate is known no better: less than the best's by less is no reason to give up

Measure = Callable[[Choice, str, LoadConfig], Trial]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """What is searched for, and for how long."""

    bound: Bound
    space: Space
    time_s: float = 600.0
    duration_s: float = 5.0  # of each run
    seed: int = 0
    finals: FinalsConfig = field(default_factory=FinalsConfig)

    def validate(self) -> None:
        self.bound.validate()
        self.finals.validate()
        require(self.duration_s > 0, f"--duration {self.duration_s:g}s: must be above 0")
        least = min(ALONE_S, self.duration_s) + 2 * self.duration_s
        require(
            self.time_s >= least,
            f"--time {self.time_s:g}s: too short for a single set of options; it takes {least:g}s at --duration"
            f" {self.duration_s:g}s, and what the runs take to start",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An open-loop run: what was asked, and what came."""

    trial: str
    requests_per_s: float
    goodput_samples_per_s: float
    p99_s: float | None
    holds: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A set of options, and what came of it."""

    choice: Choice
    saturated_samples_per_s: float | None = None  # a closed loop's: what it can do at most
    requests_per_s: float | None = None  # the highest rate that held
    goodput_samples_per_s: float | None = None  # at that rate
    p99_s: float | None = None  # at that rate
    points: tuple[Point, ...] = ()
    left_out: str = ""  # why it was given up: wrong answers, failures, less than the best
    usable: bool = True  # it answers rightly, and one request by itself in time

    @property
    def promise(self) -> tuple[float, float, float]:
        """What it is ranked by: goodput that held the bound, goodput that did not, and what it does at most."""
        beyond = max((point.goodput_samples_per_s for point in self.points), default=0.0)
        return self.goodput_samples_per_s or 0.0, beyond, self.saturated_samples_per_s or 0.0


class Requests(Protocol):
    """How the closed loop is run."""

    def __call__(self, choice: Choice) -> int:
        """Return how many requests keep these options busy."""


@dataclass(slots=True)
class Tuning:
    """A search under way."""

    config: TuneConfig
    measure: Measure
    in_flight: Requests
    watcher: Watcher
    budget: Budget
    tried: list[Tried] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    reserved_s: float = 0.0  # for the finals
    _unable: dict[tuple[str, bool], str] = field(default_factory=dict)  # forms of the model, and why; "": able
    _made: int = 0  # runs begun; one that raises leaves no trial

    @property
    def best(self) -> Tried | None:
        able = (each for each in self.tried if each.goodput_samples_per_s and not each.left_out)
        return max(able, key=lambda each: each.promise, default=None)

    def search(self, optimiser: Optimiser) -> None:
        """Try options until the time for it, or what there is to try, is used up.

        Raises RunFailed where no options held the bound, and says which came nearest.
        """
        try:
            self._check_forms()
            while (choice := optimiser.ask()) is not None:
                tried = self._try(choice, optimiser)
                self.tried.append(tried)
                optimiser.tell(None if tried.left_out else tried.goodput_samples_per_s)
                self.watcher.found(told(tried))
        except OutOfTimeError:
            self.watcher.found(f"the time for trying options is used up; {len(self.tried)} were tried")
        if self.best is None:
            raise RunFailed(self._why_none())

    def _check_forms(self) -> None:
        """See which forms of the model answer rightly, and one request within the bound. Raises RunFailed if none."""
        space = self.config.space
        for precision in space.precision:
            for compiled in space.compile:
                choice = space.simplest(precision, compiled=compiled)
                self._unable[choice.model_form] = why = self._why_unable(choice)
                if why:
                    self.watcher.found(f"precision={precision} compile={'on' if compiled else 'off'}: {why}")
        if all(self._unable.values()):
            raise RunFailed(
                f"--p99 {milliseconds(self.config.bound.p99_s)}: nothing can hold it. "
                + "; ".join(f"{form[0]}{', compiled' * form[1]}: {why}" for form, why in self._unable.items())
            )

    def _why_unable(self, choice: Choice) -> str:
        try:
            alone = self._closed(choice, "alone", 1, min(ALONE_S, self.config.duration_s))
        except (OutputError, DeviceUnavailable):
            raise
        except HeadraceError as error:
            return str(error)
        if alone.error or alone.failed or not len(alone.response_s):
            return alone.error or "no answer came"
        if never_holds(alone, self.config.bound):
            verdict = judge_rate(alone.rate, [alone], self.config.bound)
            assert verdict.p50_s is not None
            assert verdict.p99_s is not None
            times = f"{milliseconds(verdict.p50_s)} (p50), {milliseconds(verdict.p99_s)} (p99)"
            return f"one request alone takes {times}; raise --p99"
        return ""

    def _try(self, choice: Choice, optimiser: Optimiser) -> Tried:
        why = self._unable[choice.model_form]
        if why:
            return Tried(choice=choice, left_out=why, usable=False)
        try:
            saturated = self._closed(choice, "saturated", self.in_flight(choice), self.config.duration_s / 2)
        except (OutputError, DeviceUnavailable):
            raise
        except HeadraceError as error:
            return Tried(choice=choice, left_out=str(error), usable=False)
        if saturated.error or not saturated.rate:
            return Tried(choice=choice, left_out=saturated.error or "nothing was answered", usable=False)
        most = saturated.rate * saturated.rows
        hopeful = optimiser.worth_more(1, most)
        best = self.best
        if best is not None and most * SPARE < (best.goodput_samples_per_s or 0.0):
            hopeful = False
        if not hopeful:
            return Tried(choice=choice, saturated_samples_per_s=most, left_out=f"does {most:,.4g} samples/s at most")
        return self._highest(choice, saturated, best)

    def _highest(self, choice: Choice, saturated: Trial, best: Tried | None) -> Tried:
        """Find the highest rate that these options hold, or that it is not above the best's."""
        bisection, points = Bisection(saturated.rate, NEAR), []
        rate = min(best.requests_per_s, saturated.rate) if best is not None and best.requests_per_s else None
        least = rate
        for _ in range(PROBES):
            rate = rate or bisection.next()
            if rate is None:
                break
            try:
                points.append(self._probe(choice, rate))
            except OutOfTimeError:
                if not points:
                    raise
                break  # what these options have shown by now counts
            bisection.tell(rate, holds=points[-1].holds)
            if points[-1].holds is False and rate == least:
                break
            rate = None
        held = next((point for point in points if point.requests_per_s == bisection.held), None)
        most = saturated.rate * saturated.rows
        if held is None:
            return Tried(choice=choice, saturated_samples_per_s=most, points=tuple(points), left_out=points[-1].reason)
        return Tried(
            choice=choice,
            saturated_samples_per_s=most,
            requests_per_s=held.requests_per_s,
            goodput_samples_per_s=held.goodput_samples_per_s,
            p99_s=held.p99_s,
            points=tuple(points),
        )

    def _probe(self, choice: Choice, rate: float) -> Point:
        load = LoadConfig(
            kind="poisson",
            rate=rate,
            duration_s=self.config.duration_s,
            seed=self.config.seed + len(self.trials),
            bound_s=self.config.bound.p99_s,
        )
        return point(self.run(choice, "rate", load), self.config.bound)

    def _closed(self, choice: Choice, kind: Kind, in_flight: int, duration_s: float) -> Trial:
        load = LoadConfig(kind="closed", concurrency=in_flight, duration_s=duration_s)
        return self.run(choice, kind, load)

    def run(self, choice: Choice, kind: Kind, load: LoadConfig) -> Trial:
        """Make a run, if there is time for it. Raises OutOfTimeError, and what runs raise."""
        duration_s = load.duration_s or 0.0
        if kind != "final":  # which are begun only if there is time for all
            self.budget.require(duration_s + self.reserved_s)
        rate = f" at {load.rate:,.4g} requests/s" if load.rate else ""
        self.watcher.step(f"{kind}{rate}: {choice}", self.budget.left_s)
        began_ns = self.budget.now_ns()
        name = trial_name(self._made, kind, f"{load.rate:.4g}" if load.rate else "")
        self._made += 1
        trial = self.measure(choice, name, load)
        self.budget.spent(duration_s, began_ns)
        self.reserved_s = self.config.finals.time_s(self.budget.cost_s(self.config.duration_s), self.config.time_s)
        self.trials.append(trial)
        return trial

    def finals(self) -> Finals | None:
        """Repeat the best options; None where the time allows no two runs of each."""
        usable = (each for each in self.tried if each.usable)
        ranked = sorted(usable, key=lambda each: each.promise, reverse=True)
        best = self.best
        assert best is not None
        assert best.requests_per_s is not None
        races = Races(
            config=self.config.finals,
            bound=self.config.bound,
            seed=self.config.seed,
            race=self._race,
            fits=lambda runs: runs * self.budget.cost_s(self.config.duration_s) <= self.budget.left_s,
        )
        return races.run([each.choice for each in ranked[: self.config.finals.finalists]], best.requests_per_s)

    def _race(self, choice: Choice, rate: float, number: int) -> Trial:
        load = LoadConfig(
            kind="poisson",
            rate=rate,
            duration_s=self.config.duration_s,
            seed=self.config.seed + FINAL_SEEDS + number,
            bound_s=self.config.bound.p99_s,
        )
        trial = self.run(choice, "final", load)
        self.watcher.found(f"final, {choice}: {trial.goodput(self.config.bound.p99_s):,.4g} samples/s within the bound")
        return trial

    def _why_none(self) -> str:
        bound = milliseconds(self.config.bound.p99_s)
        points = [(point, each.choice) for each in self.tried for point in each.points if point.p99_s is not None]
        if points:
            nearest, choice = min(points, key=lambda pair: pair[0].p99_s or 0.0)
            assert nearest.p99_s is not None
            return (
                f"no options that were tried hold p99 {bound}; nearest came {milliseconds(nearest.p99_s)} at"
                f" {nearest.requests_per_s:,.4g} requests/s with {choice}; raise --p99, --time or --duration"
            )
        if self.tried:
            return f"no options that were tried can be used; the last: {self.tried[-1].left_out}"
        cost_s = self.budget.cost_s(self.config.duration_s)
        return (
            f"--time {self.config.time_s:g}s: used up before one set of options was measured; a run takes"
            f" {cost_s:.0f} s here with its start, so give it at least {8 * cost_s:.0f}s"
        )


def point(trial: Trial, bound: Bound) -> Point:
    """Return what an open-loop run shows."""
    verdict = judge_rate(trial.rate, [trial], bound)
    return Point(
        trial=trial.name,
        requests_per_s=trial.rate,
        goodput_samples_per_s=trial.goodput(bound.p99_s),
        p99_s=verdict.p99_s,
        holds=verdict.holds and not trial.error,
        reason=trial.error or verdict.reason,
    )


def told(tried: Tried) -> str:
    """Say what came of a set of options, in a line."""
    if tried.left_out or tried.requests_per_s is None:
        return f"{tried.choice}: left out ({tried.left_out})"
    assert tried.p99_s is not None
    return (
        f"{tried.choice}: {tried.goodput_samples_per_s:,.4g} samples/s within the bound at"
        f" {tried.requests_per_s:,.4g} requests/s, p99 {milliseconds(tried.p99_s)}"
    )
