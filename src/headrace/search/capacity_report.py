"""What a search's trials say: the capacity, a verdict per rate, and latency below it. Pure: the folders are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.errors import InvalidOption
from headrace.search.bisection import Bisection
from headrace.search.capacity import SearchConfig, by_rate, never_holds
from headrace.search.holds import Limit, RateVerdict, judge_rate, milliseconds
from headrace.search.trial import Trial
from headrace.study.intervals import PercentileInterval, percentile_interval

SCHEMA_VERSION = 1
FILE_NAME, PAGE_NAME = "capacity.json", "capacity.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A run with so many in flight as were wanted."""

    trial: str
    requests_per_s: float
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Latency at a share of the capacity. Low and high: 95 % limits, None where the run is too short for any."""

    percent: int
    trial: str
    rate: float  # requests/s
    requests: int
    p50_s: float
    p50_low_s: float | None
    p50_high_s: float | None
    p99_s: float
    p99_low_s: float | None
    p99_high_s: float | None
    holds: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityReport:
    """Everything follows from `options` and the trials' folders."""

    schema_version: int
    experiment: str
    options: SearchConfig
    requests_per_s: float | None  # the capacity: highest rate that holds, below any that does not
    samples_per_s: float | None
    not_held_requests_per_s: float | None  # the lowest rate that does not hold
    limit: Limit | None  # who kept the next rate from holding; None: it was not tried
    verdict: str  # in words
    alone: ClosedLoop | None
    saturated: ClosedLoop | None
    rates: tuple[RateVerdict, ...]  # ascending
    levels: tuple[Level, ...]
    trials: tuple[str, ...]  # folders, in order


def capacity_report(experiment: str, config: SearchConfig, trials: Sequence[Trial]) -> CapacityReport:
    """Return what the trials say of the bound."""
    rates = tuple(judge_rate(rate, made, config.bound) for rate, made in by_rate(trials).items())
    bracket = Bisection(1.0, config.resolution)
    for each in rates:
        bracket.tell(each.rate, holds=each.holds)
    alone, saturated = _first(trials, "alone"), _first(trials, "saturated")
    rows = trials[0].rows if trials else 1
    limit = next((each.limit for each in rates if each.rate == bracket.failed), None)
    return CapacityReport(
        schema_version=SCHEMA_VERSION,
        experiment=experiment,
        options=config,
        requests_per_s=bracket.held,
        samples_per_s=None if bracket.held is None else bracket.held * rows,
        not_held_requests_per_s=bracket.failed,
        limit=limit,
        verdict=_verdict(bracket, rates, config, alone),
        alone=_closed(alone),
        saturated=_closed(saturated),
        rates=rates,
        levels=tuple(_level(trial, config) for trial in trials if trial.kind == "level" and len(trial.response_s)),
        trials=tuple(trial.name for trial in trials),
    )


def _verdict(bracket: Bisection, rates: Sequence[RateVerdict], config: SearchConfig, alone: Trial | None) -> str:
    bound = f"p99 {milliseconds(config.bound.p99_s)}"
    held, failed = bracket.held, bracket.failed
    if alone is not None and not rates and never_holds(alone, config.bound):
        p50, p99 = np.percentile(alone.response_s, [50, 99]).tolist()
        return (
            f"no rate holds {bound}: one request alone takes {milliseconds(p50)} (p50), {milliseconds(p99)} (p99);"
            " raise --p99"
        )
    if not rates:
        return "no rate was tried: the time was used up, or nothing was answered; raise --time"
    if held is None:
        return f"no rate that was tried holds {bound}; at {rates[0].rate:,.4g} requests/s: {rates[0].reason}"
    at = f"{held:,.4g} requests/s hold {bound}"
    if failed is None:
        return f"{at}; no higher rate was tried that does not, so the capacity is at least that"
    worst = next(each for each in rates if each.rate == failed)
    if worst.limit == "client":
        return (
            f"{at}; above it the client is the limit, and not the server, whose capacity is at least that:"
            f" {worst.reason}; add --generators, or run the client on another machine"
        )
    unclear = "" if all(each.clear for each in rates if each.rate in (held, failed)) else ", not clear at one of them"
    words = f"{at}, {failed:,.4g} do not ({worst.reason}){unclear}"
    wide = failed / held > 1 + config.resolution * 1.001
    return f"{words}; the time was used up before they were within {config.resolution:.0%}" if wide else words


def _first(trials: Sequence[Trial], kind: str) -> Trial | None:
    return next((trial for trial in trials if trial.kind == kind), None)


def _closed(trial: Trial | None) -> ClosedLoop | None:
    if trial is None:
        return None
    times = trial.response_s
    p50, p99 = np.percentile(times, [50, 99]).tolist() if len(times) else (None, None)
    return ClosedLoop(trial=trial.name, requests_per_s=trial.rate, p50_s=p50, p99_s=p99)


def _level(trial: Trial, config: SearchConfig) -> Level:
    verdict = judge_rate(trial.rate, [trial], config.bound)
    p50, p99 = _interval(trial, 50), _interval(trial, 99)
    assert verdict.p50_s is not None
    assert verdict.p99_s is not None
    return Level(
        percent=int(trial.name.rpartition("-")[2]),
        trial=trial.name,
        rate=trial.rate,
        requests=trial.requests,
        p50_s=verdict.p50_s,
        p50_low_s=p50.low if p50 else None,
        p50_high_s=p50.high if p50 else None,
        p99_s=verdict.p99_s,
        p99_low_s=p99.low if p99 else None,
        p99_high_s=p99.high if p99 else None,
        holds=verdict.holds,
        reason=verdict.reason,
    )


def _interval(trial: Trial, percentile: float) -> PercentileInterval | None:
    try:
        return percentile_interval(trial.response_s, percentile)
    except InvalidOption:  # the run is too short for an interval
        return None


def page(report: CapacityReport) -> str:
    """Return the report as Markdown."""
    lines = [f"# Capacity of {report.experiment}", "", f"{report.verdict}.", ""]
    for name, loop in (("one request at a time", report.alone), ("as many as can be in flight", report.saturated)):
        if loop is not None and loop.p50_s is not None and loop.p99_s is not None:
            lines.append(
                f"- {name}: {loop.requests_per_s:,.4g} requests/s, response time p50 {milliseconds(loop.p50_s)}, p99"
                f" {milliseconds(loop.p99_s)} (`{loop.trial}`)"
            )
    if report.levels:
        lines += [
            *("", "## Response time below the capacity", ""),
            "| of the capacity | requests/s | requests | p50 (95 %) | p99 (95 %) | |",
            "|---|---|---|---|---|---|",
            *map(_level_line, report.levels),
        ]
    if report.rates:
        lines += [
            *("", "## The rates that were tried", ""),
            "| requests/s | holds | runs | requests | p50 | p99 | beyond the bound | why |",
            "|---|---|---|---|---|---|---|---|",
            *map(_rate_line, report.rates),
        ]
    lines += [
        "",
        "Poisson arrivals, other ones in each run; p99 is of all requests of all runs at a rate. Beyond the bound:"
        " their share, and in brackets where the true one lies (95 % to either side, by what correlated requests are"
        " worth).",
        "",
    ]
    return "\n".join(lines)


def _level_line(level: Level) -> str:
    p50 = _with_limits(level.p50_s, level.p50_low_s, level.p50_high_s)
    p99 = _with_limits(level.p99_s, level.p99_low_s, level.p99_high_s)
    word = "" if level.holds else f"does not hold: {level.reason}"
    return f"| {level.percent} % | {level.rate:,.4g} | {level.requests:,} | {p50} | {p99} | {word} |"


def _with_limits(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{milliseconds(value)} (too few requests for limits)"
    return f"{milliseconds(value)} ({milliseconds(low)} to {milliseconds(high)})"


def _rate_line(each: RateVerdict) -> str:
    word = ("yes" if each.holds else "no") + ("" if each.clear else ", not clear")
    p50, p99 = ("-" if value is None else milliseconds(value) for value in (each.p50_s, each.p99_s))
    beyond = f"{each.beyond:.2%} ({each.least_beyond:.2%} to {each.most_beyond:.2%})"
    return (
        f"| {each.rate:,.4g} | {word} | {each.trials} | {each.requests:,} | {p50} | {p99} | {beyond} | {each.reason} |"
    )
