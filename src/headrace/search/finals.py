"""Which of the best options wins, and how sure that is: all at one rate with the same arrivals, in fresh processes.

They take turns, in another order in each block. At a common rate the loser's goodput falls off, since it cannot answer
as many within the bound; where nobody's does, the rate rises, and where everybody's does, it falls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from headrace.config import require
from headrace.search.holds import Bound, RateVerdict, judge_rate
from headrace.search.space import Choice
from headrace.search.trial import Trial
from headrace.study.intervals import Runs, compare_runs
from headrace.study.verdict import percent, signed_percent
from headrace.study.welch import RatioInterval

STEP = 1.1  # from a rate to the next
LEVELS = 3  # rates at most
FAR = 2.0  # beyond its own highest rate a server's goodput says little but that

Race = Callable[[Choice, float, int], Trial]  # options, rate, number of the block


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalsConfig:
    """How many take part, and how often."""

    finalists: int = 2
    repeats: int = 5  # runs of each, at a rate
    time_share: float = 0.4  # of all time, at most

    def validate(self) -> None:
        require(self.finalists >= 1, f"--finalists {self.finalists}: at least 1 set of options must win")
        require(self.repeats >= 2, f"--repeats {self.repeats}: at least 2, or nothing can be said of the difference")

    def time_s(self, run_s: float, time_s: float) -> float:
        """Return how much time to keep for the finals, when a run takes so long and all of it is so long."""
        return min(self.finalists * self.repeats * run_s, self.time_share * time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One set of options at the rate of the finals."""

    choice: Choice
    verdict: RateVerdict
    goodput_samples_per_s: tuple[float, ...]  # of each run
    trials: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finals:
    """All at one rate, the winner first."""

    requests_per_s: float
    finalists: tuple[Finalist, ...]
    ratio: RatioInterval | None  # winner's goodput over the second's, at 95 %; None: there is none
    sure: bool  # the interval leaves out 1
    verdict: str


def block(choices: Sequence[Choice], number: int, seed: int) -> list[Choice]:
    """Return the order of a block: everybody once, another order each time."""
    order = list(choices)
    random.Random(f"{seed} {number}").shuffle(order)  # noqa: S311  no secret
    return order


def judge_finals(rate: float, runs: dict[Choice, list[Trial]], bound: Bound) -> Finals:
    """Judge the runs at one rate; each has as many, in the order of the blocks.

    Who holds the bound comes before who does not, then who answered more within it.
    """
    finalists = sorted((_finalist(rate, choice, made, bound) for choice, made in runs.items()), key=_rank)
    ratio = _ratio(finalists)
    return Finals(
        requests_per_s=rate,
        finalists=tuple(finalists),
        ratio=ratio,
        sure=ratio is not None and ratio.low > 1,
        verdict=_words(finalists, ratio),
    )


def _rank(finalist: Finalist) -> tuple[bool, float]:
    return not finalist.verdict.holds, -fmean(finalist.goodput_samples_per_s)


def _finalist(rate: float, choice: Choice, made: Sequence[Trial], bound: Bound) -> Finalist:
    return Finalist(
        choice=choice,
        verdict=judge_rate(rate, made, bound),
        goodput_samples_per_s=tuple(trial.goodput(bound.p99_s) for trial in made),
        trials=tuple(trial.name for trial in made),
    )


def _ratio(finalists: Sequence[Finalist]) -> RatioInterval | None:
    if len(finalists) < 2:
        return None
    winner, second = (each.goodput_samples_per_s for each in finalists[:2])
    if min(len(winner), len(second)) < 2 or min(*winner, *second) <= 0:
        return None
    blocks = tuple(range(len(winner)))
    return compare_runs(Runs(values=second, repeats=blocks), Runs(values=winner, repeats=blocks)).interval


def _words(finalists: Sequence[Finalist], ratio: RatioInterval | None) -> str:
    winner = finalists[0]
    rate = f"{winner.verdict.rate:,.4g} requests/s"
    held = "" if winner.verdict.holds else f"; it does not hold {rate} ({winner.verdict.reason})"
    if len(finalists) < 2:
        return f"there are no other options that can be used, or --finalists 1{held}"
    number = len(winner.goodput_samples_per_s)
    runs = f"{number} runs each, with the same arrivals, at {rate}"
    if ratio is None:
        return f"the winner wins: the second left whole runs without an answer in time ({runs}){held}"
    if ratio.low > FAR:
        return f"the winner wins by far: the second cannot answer half as many within the bound ({runs}){held}"
    if ratio.low > 1:
        low, high = percent((ratio.low - 1) * 100), percent((ratio.high - 1) * 100)
        return f"the winner wins with {low} to {high} % more answers within the bound (95 %; {runs}){held}"
    span = f"{signed_percent(ratio.low)} to {signed_percent(ratio.high)} %"
    return f"the first two cannot be told apart ({span} of answers within the bound, 95 %; {runs}){held}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Races:
    """Makes the finals: `race` makes a run, `fits` says whether there is time for so many."""

    config: FinalsConfig
    bound: Bound
    seed: int
    race: Race
    fits: Callable[[int], bool]

    def run(self, choices: Sequence[Choice], rate: float) -> Finals | None:
        """Return the finals at the rate that tells most; None where there is no time for two runs of each."""
        found: list[Finals] = []
        while len(found) < LEVELS:
            repeats = next((n for n in range(self.config.repeats, 1, -1) if self.fits(n * len(choices))), 0)
            if not repeats:
                break
            found.append(self._at(choices, rate, repeats))
            holding = sum(each.verdict.holds for each in found[-1].finalists)
            if holding and (holding < len(choices) or found[-1].sure or len(choices) == 1):
                break
            rate = rate * STEP if holding else rate / STEP
        held = [each for each in found if each.finalists[0].verdict.holds]
        if held:
            return max(held, key=lambda each: each.requests_per_s)
        return found[-1] if found else None

    def _at(self, choices: Sequence[Choice], rate: float, repeats: int) -> Finals:
        runs: dict[Choice, list[Trial]] = {choice: [] for choice in choices}
        for number in range(repeats):
            for choice in block(choices, number, self.seed):
                runs[choice].append(self.race(choice, rate, number))
        return judge_finals(rate, runs, self.bound)
