"""How often the intervals of `headrace compare` hold the truth, and how often those do that it does not use.

Rows that are done are kept beside the page, as JSON; interrupted, the same command goes on from there.

    python benchmarks/coverage.py --output benchmarks/results/statistics/coverage.md

Queues whose truth is known are simulated (Lindley's recursion, Poisson arrivals; M/D/1 and M/M/1), 1,000 times for
each row, with processes that differ in speed. Successive response times depend on each other, as those of a server do.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy
from scipy.special import bdtrik, ndtri

from headrace.bench.correlation import block_length
from headrace.bench.steady import is_steady
from headrace.bench.validity import backlog
from headrace.errors import InvalidOption
from headrace.files import write_whole
from headrace.study.intervals import Runs, compare_runs, percentile_interval
from headrace.study.power import more_runs
from headrace.study.welch import Moments, RatioInterval, half_width

Law = Literal["M/D/1", "M/M/1"]
Array = npt.NDArray[np.float64]
SPREAD = 0.05  # standard deviation of the logarithm of a process's speed
FASTER = 0.9  # the candidate's times over the base's
SETTLED = 2000  # requests at a run's beginning that are left out, for the queue to fill
Z = float(ndtri(0.975))
MEAN, P50, P99, THROUGHPUT, GOODPUT = "mean", "p50", "p99", "throughput", "goodput"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: what was simulated, and how often what came out was so."""

    what: str
    trials: int
    shares: dict[str, float | None]  # None: there was nothing to judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Two sides of simulated runs: [2, processes, requests] of time-ordered response times, and the runs' windows."""

    responses: Array
    windows: Array  # [2, processes]


def responses(rng: np.random.Generator, law: Law, load: float, shape: tuple[int, ...], settled: int = SETTLED) -> Array:
    """Simulate response times, mean service time 1, [..., requests], by Lindley's recursion in closed form.

    Source: D. V. Lindley, "The theory of queues with a single server", Mathematical Proceedings of the Cambridge
    Philosophical Society 48 (1952).
    """
    *runs, requests = shape
    size = (*runs, requests + settled)
    services = np.ones(size) if law == "M/D/1" else rng.exponential(1, size)
    steps = services[..., :-1] - rng.exponential(1 / load, size)[..., 1:]
    walk = np.concatenate((np.zeros((*runs, 1)), np.cumsum(steps, axis=-1)), axis=-1)
    found: Array = (walk - np.minimum.accumulate(walk, axis=-1) + services)[..., settled:]
    return found


def two_sides(rng: np.random.Generator, law: Law, load: float, processes: int, requests: int) -> Sides:
    """Simulate a base and a candidate that is faster by 10 %, under as high a load."""
    speed = np.exp(rng.normal(0, SPREAD, (2, processes)))
    speed[1] *= FASTER
    windows = rng.gamma(requests, 1 / load, (2, processes)) * speed
    return Sides(responses=responses(rng, law, load, (2, processes, requests)) * speed[..., None], windows=windows)


def quantities(sides: Sides, bound: float) -> dict[str, Array]:
    """Return each quantity of each run, [2, processes]."""
    times = sides.responses
    p50, p99 = np.quantile(times, (0.5, 0.99), axis=-1)
    return {
        MEAN: times.mean(axis=-1),
        P50: p50,
        P99: p99,
        THROUGHPUT: times.shape[-1] / sides.windows,
        GOODPUT: (times <= bound).sum(axis=-1) / sides.windows,
    }


def true_logs(rng: np.random.Generator, law: Law, load: float, bound: float) -> dict[str, float]:
    """Return the logarithm of the true ratio of each quantity, of the geometric means over all processes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    sample = np.sort(responses(rng, law, load, (20, 200_000)).ravel())

    def within(scale: float) -> float:  # mean over processes of log P(response <= bound)
        shares = np.searchsorted(sample, bound / (scale * np.exp(SPREAD * nodes)), side="right") / len(sample)
        return float(np.log(shares) @ weights / weights.sum())

    times, rates = math.log(FASTER), -math.log(FASTER)
    good = rates + within(FASTER) - within(1.0)
    return {MEAN: times, P50: times, P99: times, THROUGHPUT: rates, GOODPUT: good}


def holds(interval: RatioInterval, log_ratio: float) -> bool:
    return interval.low <= math.exp(log_ratio) <= interval.high


def ratio_trial(sides: Sides, truth: dict[str, float], bound: float) -> dict[str, bool]:
    """Return, for each quantity, whether the interval held the truth, and whether the base differed from itself."""
    outcome, differs = {}, False
    for name, values in quantities(sides, bound).items():
        base, candidate = (Runs(values=tuple(side)) for side in values.tolist())
        outcome[name] = holds(compare_runs(base, candidate).interval, truth[name])
        if name == P99:
            differs = not holds(compare_runs(*base.halves()).interval, 0.0)
    return outcome | {"all five": all(outcome.values()), "base differs from itself (p99)": differs}


def ratio_row(rng: np.random.Generator, trials: int, law: Law, load: float, processes: int, requests: int) -> Row:
    """Try the intervals of ratios."""
    bound = float(np.quantile(responses(rng, law, load, (200_000,)), 0.9))
    truth = true_logs(rng, law, load, bound)
    outcomes = [ratio_trial(two_sides(rng, law, load, processes, requests), truth, bound) for _ in range(trials)]
    return Row(what=f"{law}, load {load}, {processes} and {processes} runs", trials=trials, shares=_shares(outcomes))


def unlike_loads_row(rng: np.random.Generator, trials: int, processes: int, requests: int) -> Row:
    """Try sides whose laws differ, so that no error of the estimates cancels: M/M/1 at 0.8, and at 0.7."""
    truth = math.log((1 - 0.8) / (1 - 0.7))  # response times are exponential
    outcomes = []
    for _ in range(trials):
        speed = np.exp(rng.normal(0, SPREAD, (2, processes, 1)))
        times = np.stack([responses(rng, "M/M/1", load, (processes, requests)) for load in (0.8, 0.7)]) * speed
        values = quantities(Sides(responses=times, windows=np.ones((2, processes))), 1.0)
        outcomes.append(
            {
                name: holds(compare_runs(*(Runs(values=tuple(side)) for side in values[name].tolist())).interval, truth)
                for name in (MEAN, P50, P99)
            }
        )
    return Row(
        what=f"M/M/1, load 0.8 against 0.7, {processes} and {processes} runs", trials=trials, shares=_shares(outcomes)
    )


# What is not used, and why: each method returns the ends of an interval of the logarithm of the ratio of p99s.


def of_requests_as_independent(rng: np.random.Generator, times: Array) -> tuple[float, float]:
    """Pool each side's requests, and bootstrap them one by one (2,000 times; exact in law, by order statistics)."""
    logs = []
    for side in times:
        ordered = np.sort(side.ravel())
        rank = math.ceil(0.99 * len(ordered))
        places = rng.beta(rank, len(ordered) - rank + 1, 2000) * len(ordered)
        logs.append(np.log(ordered[places.astype(int)]))
    return _ends(logs[1] - logs[0])


def bootstrap_of_runs(rng: np.random.Generator, logs: Array) -> tuple[float, float]:
    """Draw runs with replacement, and take the middle 95 % of the ratios."""
    means = [side[rng.integers(len(side), size=(2000, len(side)))].mean(axis=1) for side in logs]
    return _ends(means[1] - means[0])


def hierarchical_bootstrap(drawn: Sequence[Array]) -> tuple[float, float]:
    """Of drawn runs, and circular blocks of requests drawn within each, take the middle 95 % of the ratios."""
    return _ends(drawn[1].mean(axis=1) - drawn[0].mean(axis=1))


def studentised_bootstrap(drawn: Sequence[Array], logs: Array) -> tuple[float, float]:
    """As `hierarchical_bootstrap`, but of the difference over its standard error (bootstrap-t)."""
    difference = logs[1].mean() - logs[0].mean()
    error = math.sqrt(sum(side.var(ddof=1) / len(side) for side in logs))
    errors = np.sqrt(sum(side.var(axis=1, ddof=1) / side.shape[1] for side in drawn))
    low, high = _ends((drawn[1].mean(axis=1) - drawn[0].mean(axis=1) - difference) / errors)
    return difference - high * error, difference - low * error


def jackknife_of_pooled(times: Array, share: float) -> tuple[float, float]:
    """Take the percentile of all requests of a side together, its error by leaving out one run at a time."""
    spreads, middles = [], []
    for side in times:
        runs = len(side)
        whole = math.log(np.quantile(side, share))
        without = [math.log(np.quantile(np.delete(side, run, axis=0), share)) for run in range(runs)]
        middles.append(whole)
        spreads.append(Moments.of([runs * whole - (runs - 1) * other for other in without]))
    half = half_width(spreads)
    return middles[1] - middles[0] - half, middles[1] - middles[0] + half


def _drawn_p99s(rng: np.random.Generator, times: Array, draws: int = 500) -> list[Array]:
    """Return logarithms of p99s of drawn runs, whose blocks are drawn too: per side [draws, runs]."""
    sides = []
    for side in times:
        replicates = np.stack([_block_replicates(rng, run, draws) for run in side])
        chosen = rng.integers(len(side), size=(draws, len(side)))
        sides.append(replicates[chosen, rng.integers(draws, size=chosen.shape)])
    return sides


def _block_replicates(rng: np.random.Generator, run: Array, draws: int) -> Array:
    """Return logarithms of the p99s of circular block bootstraps of one run, from counts per block and value."""
    n, length = len(run), block_length((run <= np.quantile(run, 0.99)).astype(float))
    edges = np.quantile(run, np.linspace(0.93, 1, 141))  # steps of 1 in 2,000; p99 is looked for among them
    bins = np.searchsorted(edges, run, side="right")
    blocks = n // length
    counts = np.zeros((blocks, len(edges) + 1))
    np.add.at(counts, (np.minimum(np.arange(n) // length, blocks - 1), bins), 1)
    drawn = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws) @ counts
    above = np.cumsum(drawn[:, ::-1], axis=1)[:, ::-1] / drawn.sum(axis=1, keepdims=True)
    place = np.clip((above > 0.01).sum(axis=1) - 1, 0, len(edges) - 1)
    return np.log(edges[place])


def rejected_row(rng: np.random.Generator, trials: int, law: Law, load: float, processes: int, requests: int) -> Row:
    """Try what is not used, on p99, beside what is."""
    truth = math.log(FASTER)
    outcomes = []
    for _ in range(trials):
        times = two_sides(rng, law, load, processes, requests).responses
        p99s = np.quantile(times, 0.99, axis=-1)
        logs, drawn = np.log(p99s), _drawn_p99s(rng, times)
        ends = {
            "bootstrap of requests": of_requests_as_independent(rng, times),
            "bootstrap of runs": bootstrap_of_runs(rng, logs),
            "of runs and blocks": hierarchical_bootstrap(drawn),
            "of runs and blocks, bootstrap-t": studentised_bootstrap(drawn, logs),
            "pooled p99, jackknife": jackknife_of_pooled(times, 0.99),
            "pooled p50, jackknife": jackknife_of_pooled(times, 0.5),
        }
        used = holds(compare_runs(*(Runs(values=tuple(side)) for side in p99s.tolist())).interval, truth)
        outcomes.append({"used": used} | {name: low <= truth <= high for name, (low, high) in ends.items()})
    return Row(what=f"{law}, load {load}, {processes} and {processes} runs", trials=trials, shares=_shares(outcomes))


def single_row(rng: np.random.Generator, trials: int, law: Law, load: float, requests: int) -> Row:
    """Try the interval of one run's p99, and the one of requests as if they were independent."""
    truth = float(np.quantile(responses(rng, law, load, (50, 200_000)), 0.99))
    given, held, naive = 0, 0, 0
    ranks = (np.array([bdtrik(0.025, requests, 0.99), bdtrik(0.975, requests, 0.99)])).astype(int)
    for _ in range(trials):
        run = responses(rng, law, load, (requests,))
        low, high = np.sort(run)[np.minimum(ranks, requests - 1)]
        naive += int(low <= truth <= high)
        try:
            interval = percentile_interval(run, 99)
        except InvalidOption:
            continue
        given += 1
        held += int(interval.low <= truth <= interval.high)
    shares = {
        "refused": 1 - given / trials,
        "covers": held / given if given else None,
        "as if independent": naive / trials,
    }
    return Row(what=f"{law}, load {load}, {requests:,} requests", trials=trials, shares=shares)


def pairing_row(rng: np.random.Generator, trials: int, runs: int, blocks: float) -> Row:
    """Try blocks whose effect has `blocks` times the spread of runs within a block."""
    outcomes = []
    for _ in range(trials):
        values = np.exp(0.02 * (rng.normal(0, 1, (2, runs)) + rng.normal(0, blocks, runs)))
        base, candidate = (Runs(values=tuple(side), repeats=tuple(range(runs))) for side in values.tolist())
        ratio = compare_runs(base, candidate)
        outcomes.append({"covers": holds(ratio.interval, 0.0), "paired": ratio.paired})
    return Row(what=f"{runs} blocks, their spread {blocks} of that within", trials=trials, shares=_shares(outcomes))


def power_row(rng: np.random.Generator, trials: int, runs: int, spread: float) -> Row:
    """Try whether as many more runs as advised make the interval narrow enough."""
    outcomes = []
    for _ in range(trials):
        sides = rng.normal(0, spread, (2, runs))
        advice = more_runs([Moments.of(side.tolist()) for side in sides], 0.02)
        outcome = {}
        for name, more in (("likely", advice.likely), ("cautious", advice.cautious)):
            grown = [[*side, *rng.normal(0, spread, more or 0)] for side in sides]
            outcome[name] = more is not None and half_width([Moments.of(side) for side in grown]) <= math.log1p(0.02)
        outcomes.append(outcome)
    return Row(what=f"{runs} and {runs} runs that spread by {spread:.0%}", trials=trials, shares=_shares(outcomes))


def steady_row(rng: np.random.Generator, trials: int, law: Law, load: float, requests: int) -> Row:
    """Try how often a run is called not steady."""
    outcomes = []
    for _ in range(trials):
        scheduled = np.cumsum(rng.exponential(1e6 / load, requests)).astype(np.int64)
        times = (responses(rng, law, load, (requests,)) * 1e6).astype(np.int64)
        outcomes.append({"called not steady": is_steady(scheduled, times).steady is False})
    return Row(what=f"{law}, load {load}, {requests:,} requests", trials=trials, shares=_shares(outcomes))


def empty_row(rng: np.random.Generator, trials: int, law: Law, load: float, requests: int) -> Row:
    """Try both tests of overload on runs whose queue is empty at first, as that of a server is."""
    outcomes = []
    for _ in range(trials):
        scheduled = np.cumsum(rng.exponential(1e6 / load, requests)).astype(np.int64)
        times = (responses(rng, law, load, (requests,), settled=0) * 1e6).astype(np.int64)
        outcomes.append(
            {
                "response times: not steady": is_steady(scheduled, times).steady is False,
                "number in the system: no latency exists": bool(backlog(scheduled, scheduled + times)),
            }
        )
    return Row(what=f"{law}, load {load}, {requests:,} requests", trials=trials, shares=_shares(outcomes))


Make = Callable[..., Row]
LAWS: tuple[Law, ...] = ("M/D/1", "M/M/1")
LOADS = (0.5, 0.8, 0.9)
TABLES: dict[str, tuple[tuple[Make, tuple[object, ...]], ...]] = {
    "Ratios, as compared: share of intervals that hold the truth": (
        *((ratio_row, (law, load, runs, 10_000)) for law in LAWS for load in LOADS for runs in (5, 10)),
    ),
    "The same where the sides' laws differ": tuple((unlike_loads_row, (runs, 10_000)) for runs in (5, 10)),
    "Ratios of p99 by other methods": tuple(
        (rejected_row, (law, load, 5, 10_000)) for law, load in (("M/D/1", 0.5), ("M/M/1", 0.8), ("M/M/1", 0.9))
    ),
    "Pairing by blocks": tuple((pairing_row, (runs, blocks)) for runs in (5, 10) for blocks in (0.0, 1.0, 2.0)),
    "More runs, as advised: share of intervals within 2 % then": tuple(
        (power_row, (runs, spread)) for runs in (3, 5, 10) for spread in (0.03, 0.05)
    ),
    "Steady runs and others": tuple(
        (steady_row, (law, load, requests))
        for law in LAWS
        for load in (0.8, 0.9, 1.05, 1.2)
        for requests in (5_000, 20_000)
    ),
    "p99 of one run": tuple(
        (single_row, (law, load, requests)) for requests in (20_000, 100_000) for law in LAWS for load in LOADS
    ),
    "Runs whose queue is empty at first, by both tests of overload": tuple(
        (empty_row, (law, load, requests)) for law in LAWS for load in (0.9, 1.1) for requests in (200, 1_000, 4_000)
    ),
}


def compute(seed: int, trials: int, jobs: int, kept: Path) -> Iterator[dict[str, list[Row]]]:
    """Compute every row that `kept` does not hold yet, each from random numbers of its own, and keep it when done.

    Yields the tables as far as they are done: first what was kept, then after each row.
    """
    rows = _kept_rows(kept, seed, trials)
    yield _tables(rows)
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(make, np.random.default_rng([seed, table, index]), trials, *arguments): (table, index)
            for table, lines in enumerate(TABLES.values())
            for index, (make, arguments) in enumerate(lines)
            if (table, index) not in rows
        }
        for done in as_completed(waiting):
            rows[waiting[done]] = done.result()
            found = [{"table": table, "row": row, **asdict(rows[table, row])} for table, row in sorted(rows)]
            write_whole(kept, json.dumps({"seed": seed, "trials": trials, "rows": found}, indent=1) + "\n")
            yield _tables(rows)


def _kept_rows(kept: Path, seed: int, trials: int) -> dict[tuple[int, int], Row]:
    held = (
        json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"seed": seed, "trials": trials, "rows": []}
    )
    if (held["seed"], held["trials"]) != (seed, trials):
        raise SystemExit(f"{kept}: made with seed {held['seed']} and {held['trials']} trials; remove it, or use those")
    return {
        (row["table"], row["row"]): Row(what=row["what"], trials=row["trials"], shares=row["shares"])
        for row in held["rows"]
    }


def _tables(rows: dict[tuple[int, int], Row]) -> dict[str, list[Row]]:
    """Sort finished rows into their tables; one without any is left out."""
    tables = {title: [rows[key] for key in sorted(rows) if key[0] == table] for table, title in enumerate(TABLES)}
    return {title: lines for title, lines in tables.items() if lines}


def render(tables: dict[str, list[Row]], seed: int, trials: int, command: str) -> str:
    """Return the page."""
    planned = sum(map(len, TABLES.values()))
    missing = planned - sum(map(len, tables.values()))
    spread = 100 * Z * math.sqrt(0.95 * 0.05 / trials)
    parts = [
        "# How often the intervals hold the truth",
        f"`{command}`; Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__};"
        f" seed {seed}, {trials:,} trials a row. Intervals are nominal 95 %; a share that is truly 95 % shows within"
        f" {spread:.1f} points of it in 19 rows of 20.",
        f"Runs are of 10,000 requests, where nothing else is said, after {SETTLED:,} that fill the queue. Processes"
        f" differ in speed by {SPREAD:.0%} (standard deviation of the logarithm); the candidate's times are {FASTER} of"
        " the base's. Truth is the ratio of the geometric means over all processes. One minus the share is the rate of"
        ' false alarms where nothing differs, before any threshold; "base differs from itself" is how often the A/A'
        " pair of a comparison (every other run against the rest) would void it. Advice of more than 200 more runs"
        " counts as not enough.",
        *(_table(title, rows) for title, rows in tables.items()),
        *([f"Not computed yet: {missing} of {planned} rows. The same command goes on."] if missing else []),
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: Sequence[Row]) -> str:
    names = list(rows[0].shares)
    lines = [f"| {' | '.join(['', *names])} |", f"|{' --- |' * (len(names) + 1)}"]
    lines += [f"| {row.what} | {' | '.join(_percent(row.shares[name]) for name in names)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _shares(outcomes: Sequence[dict[str, bool]]) -> dict[str, float | None]:
    return {name: sum(outcome[name] for outcome in outcomes) / len(outcomes) for name in outcomes[0]}


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    for tables in compute(args.seed, args.trials, args.jobs, args.output.with_suffix(".json")):
        write_whole(args.output, render(tables, args.seed, args.trials, command))


if __name__ == "__main__":
    main()
