"""The published experiment as data: its tables, and what it claimed about its four steps.

Source: benchmarks/inference in pytorch/pytorch; pull requests #115286 (executor), #116189 (copy threads) and
#116190 (predict workers). The GPU was never recorded. The wordings are ours; which quantities "everything
else" and "better" mean is read as the four columns of the tables.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from headrace.study.quantities import AVERAGE, GPU_UTILIZATION, PUBLISHED, THROUGHPUT, WARMUP, Quantity
from headrace.study.welch import Moments

RUNS_PER_ROW = 10
SMALL, LARGE = (1, 32, 64), (128, 256)
BATCH_SIZES = SMALL + LARGE


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One row of a published table."""

    batch_size: int
    compile: bool
    experiment: str
    warmup_latency_s: Moments
    average_latency_s: Moments
    throughput_samples_per_s: Moments
    gpu_utilization_pct: Moments

    def moments(self, quantity: Quantity) -> Moments:
        """Return the row's mean and spread of one of the four published quantities."""
        return {
            WARMUP.name: self.warmup_latency_s,
            AVERAGE.name: self.average_latency_s,
            THROUGHPUT.name: self.throughput_samples_per_s,
            GPU_UTILIZATION.name: self.gpu_utilization_pct,
        }[quantity.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One sentence of the experiment, about one quantity, for some batch sizes."""

    step: str
    wording: str
    base: str
    candidate: str
    batch_sizes: tuple[int, ...]
    compile: bool
    metric: Quantity
    better: bool  # the candidate was claimed to be better, else worse
    claimed_change: float | None = None  # candidate - base, in the metric's unit, where a number was given

    @property
    def claims_higher(self) -> bool:
        """Whether the candidate's value was claimed to be higher. More utilization was called better."""
        return self.better == (self.metric.higher_is_better is not False)


def load_published() -> list[PublishedRow]:
    """Return the 35 rows of the published tables."""
    text = files("headrace.study").joinpath("data", "published.csv").read_text(encoding="utf-8")
    return [_parse(row) for row in csv.DictReader(text.splitlines())]


def find(rows: Iterable[PublishedRow], experiment: str, batch_size: int, *, compiled: bool) -> PublishedRow | None:
    wanted = (experiment, batch_size, compiled)
    return next((row for row in rows if (row.experiment, row.batch_size, row.compile) == wanted), None)


def claims() -> list[Claim]:
    """Return every claim, in the order of the steps. Several workers were measured without compile only."""
    both = (False, True)
    return [
        *(claim for compiled in both for claim in _executor(compiled)),
        *(claim for compiled in both for claim in _copy_threads(compiled)),
        *_predict_workers(),
    ]


def _executor(compiled: bool) -> list[Claim]:
    others = (AVERAGE, THROUGHPUT, GPU_UTILIZATION)
    step, pair = "executor (#115286)", ("original", "executor")
    return [
        *_each(step, "a thread instead of a process shortens the warm-up", pair, (WARMUP,), compiled=compiled),
        *_each(step, "everything else gets worse", pair, others, better=False, compiled=compiled),
    ]


def _copy_threads(compiled: bool) -> list[Claim]:
    others = (AVERAGE, THROUGHPUT, GPU_UTILIZATION)
    step, pair = "copy threads (#116189)", ("original", "h2d_d2h_threads")
    small = "small batches get worse than the baseline"
    large = "large batches get better than the baseline"
    return [
        *_each(step, "warm-up is shorter at every batch size", pair, (WARMUP,), compiled=compiled),
        *_each(step, small, pair, others, batch_sizes=SMALL, better=False, compiled=compiled),
        *_each(step, large, pair, others, batch_sizes=LARGE, compiled=compiled),
    ]


def _predict_workers() -> list[Claim]:
    step, others = "predict workers (#116190)", (AVERAGE, THROUGHPUT, GPU_UTILIZATION)
    small = "several workers are still slightly worse than the baseline at small batches"
    large = "several workers beat the baseline in everything at large batches"
    two = ("original", "2_predict_workers")
    made = _each(
        step,
        "two workers are better than one everywhere",
        ("h2d_d2h_threads", "2_predict_workers"),
        PUBLISHED,
    )
    for workers in (2, 3, 4):
        pair = ("original", f"{workers}_predict_workers")
        made += _each(step, small, pair, others, batch_sizes=SMALL, better=False)
        made += _each(step, large, pair, PUBLISHED, batch_sizes=LARGE)
    for metric, change in ((THROUGHPUT, 300.0), (AVERAGE, -5.0), (WARMUP, -2.0)):
        wording = f"at 256, {metric.name} gets better, by about {change:+g} {metric.unit}; only the first is judged"
        made += [
            replace(claim, claimed_change=change)
            for claim in _each(step, wording, two, (metric,), batch_sizes=(256,), better=True)
        ]
    return made


def _each(
    step: str,
    wording: str,
    pair: tuple[str, str],
    metrics: Sequence[Quantity],
    *,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    better: bool = True,
    compiled: bool = False,
) -> list[Claim]:
    """Return the sentence once per quantity; the pair is base and candidate."""
    base, candidate = pair
    return [
        Claim(
            step=step,
            wording=wording,
            base=base,
            candidate=candidate,
            batch_sizes=batch_sizes,
            compile=compiled,
            metric=metric,
            better=better,
        )
        for metric in metrics
    ]


def _parse(row: dict[str, str]) -> PublishedRow:
    def moments(column: str) -> Moments:
        return Moments(mean=float(row[f"{column}_mean"]), std=float(row[f"{column}_std"]), n=RUNS_PER_ROW)

    return PublishedRow(
        batch_size=int(row["batch_size"]),
        compile=row["compile"] == "true",
        experiment=row["experiment"],
        warmup_latency_s=moments("warmup_latency_s"),
        average_latency_s=moments("average_latency_s"),
        throughput_samples_per_s=moments("throughput_samples_per_s"),
        gpu_utilization_pct=moments("gpu_utilization_pct"),
    )
