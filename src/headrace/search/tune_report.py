"""What `headrace tune` writes: tune.json, a page, a deployment of the winner, and the trade-off as a picture."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from headrace.config import RunConfig
from headrace.deployment import Surroundings, read_deployment
from headrace.deployment_text import as_toml
from headrace.lanes_options import REWRITES, SWITCHES
from headrace.search.finals import Finals
from headrace.search.holds import milliseconds
from headrace.search.space import Choice
from headrace.search.tune import Point, Tried, TuneConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 1
FILE_NAME, PAGE_NAME, DEPLOYMENT_NAME, PICTURE_NAME = "tune.json", "tune.md", "headrace.toml", "tune.png"
TITLE_WIDTH, DPI = 90, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    schema_version: int
    options: TuneConfig
    winner: Choice
    requests_per_s: float  # that it held
    goodput_samples_per_s: float
    p99_s: float
    verdict: str  # how sure it is that the winner wins
    finals: Finals | None  # None: no time was left for them
    tried: tuple[Tried, ...]  # in order
    untried: int  # combinations

    @property
    def bound_s(self) -> float:
        return self.options.bound.p99_s


def tune_report(config: TuneConfig, tried: Sequence[Tried], finals: Finals | None) -> TuneReport:
    """Return the outcome of a search in which at least one set of options held the bound."""
    outcome = _searched(tried) if finals is None else _of_finals(finals)
    return TuneReport(
        schema_version=SCHEMA_VERSION,
        options=config,
        winner=outcome.choice,
        requests_per_s=outcome.requests_per_s,
        goodput_samples_per_s=outcome.goodput_samples_per_s,
        p99_s=outcome.p99_s,
        verdict=finals.verdict if finals else "no time was left to repeat the best options: their order may be chance",
        finals=finals,
        tried=tuple(tried),
        untried=config.space.size - len(tried),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    choice: Choice
    requests_per_s: float
    goodput_samples_per_s: float
    p99_s: float


def _searched(tried: Sequence[Tried]) -> _Outcome:
    best = max((each for each in tried if not each.left_out), key=lambda each: each.promise)
    assert best.requests_per_s is not None
    assert best.goodput_samples_per_s is not None
    assert best.p99_s is not None
    return _Outcome(
        choice=best.choice,
        requests_per_s=best.requests_per_s,
        goodput_samples_per_s=best.goodput_samples_per_s,
        p99_s=best.p99_s,
    )


def _of_finals(finals: Finals) -> _Outcome:
    first = finals.finalists[0]
    return _Outcome(
        choice=first.choice,
        requests_per_s=finals.requests_per_s,
        goodput_samples_per_s=fmean(first.goodput_samples_per_s),
        p99_s=first.verdict.p99_s or 0.0,
    )


def deployment_toml(report: TuneReport, run: RunConfig) -> str:
    """Return a headrace.toml that serves the winner. `run` is a run of its. Raises InvalidOption."""
    lanes, model = run.lanes, run.model
    flags: dict[str, object] = {
        "source": model.name,
        "device": run.device_kind,
        "precision": model.precision,
        "compile": model.compile,
        "model_dir": str(model.model_dir.absolute()),
        "download": model.download,
        "seed": str(model.seed),
        "image_size": str(run.inputs.image_size),
        "num_workers": str(run.design.num_workers),
        "buckets": [str(rows) for rows in lanes.buckets],
        "max_queue_delay_us": str(lanes.max_queue_delay_us),
        "lane_depth": str(lanes.depth),
        **{name: getattr(lanes, name) for name in (*SWITCHES, *REWRITES, "stem")},
    }
    given = Surroundings(flags=flags, config="/dev/null", environment={}, folder=Path.cwd())
    head = (
        f"# headrace tune: {report.goodput_samples_per_s:,.4g} samples/s within {milliseconds(report.bound_s)} at"
        f" {report.requests_per_s:,.4g} requests/s of {run.inputs.batch_size} rows, p99"
        f" {milliseconds(report.p99_s)}.\n"
    )
    words = "".join(f"# {line}\n" for line in textwrap.wrap(f"{report.verdict}.", 110))
    return f"{head}{words}\n{as_toml(read_deployment(given))}"


def page(report: TuneReport) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# Most answers within {milliseconds(report.bound_s)} (p99)",
        "",
        f"`{report.winner}`: {report.goodput_samples_per_s:,.4g} samples/s at {report.requests_per_s:,.4g} requests/s,"
        f" p99 {milliseconds(report.p99_s)}.",
        "",
        f"How sure: {report.verdict}.",
        "",
        f"{len(report.tried)} sets of options were tried, {report.untried} were not.",
    ]
    if report.finals is not None:
        lines += [
            *("", f"## The finals, at {report.finals.requests_per_s:,.4g} requests/s", ""),
            "| options | within the bound, samples/s, by run | p99 | holds |",
            "|---|---|---|---|",
        ]
        for each in report.finals.finalists:
            goodputs = ", ".join(f"{value:,.4g}" for value in each.goodput_samples_per_s)
            p99 = "-" if each.verdict.p99_s is None else milliseconds(each.verdict.p99_s)
            lines.append(f"| {each.choice} | {goodputs} | {p99} | {'yes' if each.verdict.holds else 'no'} |")
    lines += [
        *("", "## What was tried", ""),
        "| options | at most, samples/s | holds, requests/s | within the bound, samples/s | p99 | left out |",
        "|---|---|---|---|---|---|",
        *map(_line, sorted(report.tried, key=lambda each: -(each.goodput_samples_per_s or 0.0))),
        "",
    ]
    return "\n".join(lines)


def _line(tried: Tried) -> str:
    numbers = (tried.saturated_samples_per_s, tried.requests_per_s, tried.goodput_samples_per_s)
    shown = " | ".join("-" if value is None else f"{value:,.4g}" for value in numbers)
    p99 = "-" if tried.p99_s is None else milliseconds(tried.p99_s)
    return f"| {tried.choice} | {shown} | {p99} | {tried.left_out} |"


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both p99 and goodput, by p99."""
    front: list[Point] = []
    for each in sorted(points, key=lambda point: (point.p99_s or 0.0, -point.goodput_samples_per_s)):
        if not front or each.goodput_samples_per_s > front[-1].goodput_samples_per_s:
            front.append(each)
    return front


def draw(report: TuneReport, path: Path) -> bool:
    """Draw goodput against p99 of every open-loop run; return whether matplotlib is there to do it. Raises OSError."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # noqa: PLC0415  optional, and slow to import

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    title = f"Answers within {milliseconds(report.bound_s)}: {report.winner}"
    figure.suptitle(textwrap.fill(title, TITLE_WIDTH), fontsize=11, fontweight="bold")
    _draw_points(figure.subplots(), report)
    figure.savefig(path, dpi=DPI)
    return True


def _draw_points(axes: Axes, report: TuneReport) -> None:
    shown = [(each.choice, point) for each in report.tried for point in each.points if point.p99_s is not None]
    for wins in (False, True):
        chosen = [point for choice, point in shown if (choice == report.winner) == wins]
        axes.scatter(
            [(point.p99_s or 0.0) * 1e3 for point in chosen],
            [point.goodput_samples_per_s for point in chosen],
            label="the winner" if wins else "other options",
            color="#1f6f8b" if wins else "#b5b5b5",
            zorder=3 if wins else 2,
        )
    front = pareto([point for _, point in shown])
    axes.plot(
        [(point.p99_s or 0.0) * 1e3 for point in front],
        [point.goodput_samples_per_s for point in front],
        color="#d1495b",
        label="no run is better in both (Pareto front)",
    )
    axes.axvline(report.bound_s * 1e3, color="black", linestyle="--", label="bound")
    axes.set_xscale("log")
    axes.set_xlabel("p99 of the response time, ms")
    axes.set_ylabel("samples/s answered within the bound")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
