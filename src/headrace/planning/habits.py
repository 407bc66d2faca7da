"""What runs add to the law: transport, the client's own time, and noise; mixed by how alike their requests were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from headrace.clock import NS_PER_S
from headrace.planning.observe import Observed, Seconds
from headrace.planning.seen import LEAST, Seen, level_of, levels, on_time, usual

STEEPNESS = 2.0  # runs whose requests differ by a factor of e in rows or rate weigh e^2 times less
MIXED = 20_000  # values that stand for a mix of distributions
ADDED_UP = 8  # batches that follow each other on a lane

Noise = dict[int, Seconds]  # by level: a batch's time over the law's, enough of them


@dataclass(frozen=True, slots=True)
class Habits:
    """What alike runs add to the law. Transport is in seconds."""

    rows: int  # of a request
    requests_per_s: float
    closed: bool  # an answer makes the next request due
    before: Seconds  # from a request's issue until the engine has it
    after: Seconds  # from its end until the answer
    again: Seconds  # from an answer until the client has sent the next request; none in an open loop
    noise: Noise

    def unlike(self, rows: int, requests_per_s: float) -> float:
        """Return how unlike such requests these were."""
        return abs(log(self.rows / rows)) + abs(log(self.requests_per_s / requests_per_s))


@dataclass(frozen=True, slots=True)
class Alike:
    """A mix of runs' habits, the more of each the more alike its requests were in rows and rate.

    Each request costs the host time, so their rate counts as their rows do. A mix changes little by little with the
    rate, where the most alike alone would change at once.
    """

    habits: tuple[Habits, ...]
    rows: int
    requests_per_s: float
    closed: bool
    random: np.random.Generator

    def before(self) -> Seconds:
        return self._mix([(each, each.before) for each in self.habits])

    def after(self) -> Seconds:
        return self._mix([(each, each.after) for each in self.habits])

    def again(self) -> Seconds:
        return self._mix([(each, each.again) for each in self.habits if len(each.again)])

    def noise(self, running: float) -> Seconds:
        """Return that of batches beside which about as many ran, in such loops where there were any.

        A client that waits for the moment at which its next request is due keeps a processor busy. On a host with few
        it takes that from the model: on two, a tenth of the batches took twice as long.
        """
        noisy = [each for each in self.habits if each.noise]
        chosen = [each for each in noisy if each.closed == self.closed] or noisy
        return self._mix([(each, noise_near(each.noise, running)) for each in chosen], otherwise=1.0)

    def _mix(self, parts: Sequence[tuple[Habits, Seconds]], otherwise: float = 0.0) -> Seconds:
        """Draw from each as many as its likeness says."""
        if not parts:
            return np.full(1, otherwise)
        distances = np.array([each.unlike(self.rows, self.requests_per_s) for each, _ in parts])
        weights = np.exp(-STEEPNESS * (distances - distances.min()))
        counts = np.rint(weights / weights.sum() * MIXED).astype(int)
        return np.concatenate(
            [self.random.choice(values, count) for (_, values), count in zip(parts, counts, strict=True) if count]
        )


def noise_near(noise: Noise, running: float) -> Seconds:
    return noise[min(noise, key=lambda level: abs(level - level_of(running)))]


def habits_of(seen: Sequence[Seen], expected: Sequence[Seconds]) -> Iterable[Habits]:
    """Return those of each configuration; `expected` is what the law says of each run's batches."""
    for cell in sorted({each.run.cell for each in seen}):
        alike = [(each, law_s) for each, law_s in zip(seen, expected, strict=True) if each.run.cell == cell]
        runs = [each.run for each, _ in alike]
        staged = [run.records for run in runs if run.staged]
        before, after = np.zeros(1), np.zeros(1)  # else all is in the batches' own times
        if staged:
            before = np.concatenate([records["received_ns"] - records["issued_ns"] for records in staged]) / NS_PER_S
            before = before[on_time(before, float(np.median(before)))]
            after = np.concatenate([records["completed_ns"] - records["computed_ns"] for records in staged]) / NS_PER_S
        yield Habits(
            rows=runs[0].setup.rows,
            requests_per_s=float(np.mean([run.requests_per_s for run in runs])),
            closed=runs[0].concurrency is not None,
            before=before,
            after=after,
            again=np.concatenate([_again(run) for run in runs]),
            noise=_noise(alike),
        )


def _again(run: Observed) -> Seconds:
    """The n-th answer lets the client send the request that is n + `concurrency` in order; nothing in an open loop."""
    concurrency = run.concurrency
    if concurrency is None or concurrency >= len(run.records):
        return np.empty(0)
    issued, completed = np.sort(run.records["issued_ns"]), np.sort(run.records["completed_ns"])
    gaps = np.maximum(issued[concurrency:] - completed[: len(issued) - concurrency], 0) / NS_PER_S
    return np.asarray(gaps[on_time(gaps, float(np.median(gaps)))])


def _noise(alike: Sequence[tuple[Seen, Seconds]]) -> Noise:
    factors, at_levels = [np.empty(0)], [np.empty(0)]
    for each, expected in alike:
        telling = on_time(each.batches.seconds, expected) & usual(each)
        own = (each.batches.seconds / expected)[telling]
        if len(own):
            # What a run differs from the law by is the law's error, not noise.
            factors.append(1 + (own / np.median(own) - 1) * _lasting(own))
            at_levels.append(levels(each.running)[telling])
    all_factors, at = np.concatenate(factors), np.concatenate(at_levels)
    noise = {int(level): all_factors[at == level] for level in np.unique(at)}
    return {level: found for level, found in noise.items() if len(found) >= LEAST}


def _lasting(factors: Seconds) -> float:
    """Return the share of the noise that stays when batches that follow each other are added up.

    A batch that is seen late makes the next one on its lane seem short; that is no noise of the device.
    """
    groups = factors[: len(factors) // ADDED_UP * ADDED_UP].reshape(-1, ADDED_UP)
    if len(groups) < 2 or not factors.std():
        return 1.0
    return min(1.0, float(groups.mean(axis=1).std() * np.sqrt(ADDED_UP) / factors.std()))
