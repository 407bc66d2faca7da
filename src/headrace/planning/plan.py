"""A capacity plan: runs in, everything that is told out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.bench.summary import RunSummary
from headrace.planning.calibrate import Calibrated, calibrate
from headrace.planning.fleet import (
    Ask,
    Bytes,
    Choice,
    Fleet,
    Latency,
    choose,
    fleet,
    latency_at,
    limits,
    setups,
)
from headrace.planning.holdout import P99_TARGET, THROUGHPUT_TARGET, Checked, leave_one_out
from headrace.planning.observe import Observed, Setup
from headrace.study.finished import machine

SCHEMA_VERSION = 1
ITEM_BYTES = {"float32": 4, "uint8": 1}
DRAWN = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.04)  # of a GPU's rate: points of the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class PausesFound:
    per_s: float
    share: float
    mean_s: float
    max_s: float
    p99_without_s: float  # of the chosen setup at the same rate, if the host never paused


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """All that is told; `--json` prints it."""

    schema_version: int
    machine: str
    runs: tuple[str, ...]
    ask: Ask
    bytes: Bytes
    choices: tuple[Choice, ...]  # the best first
    fleets: tuple[Fleet, ...]
    limits: dict[str, float]  # requests/s, the smallest first
    curve: dict[float, float]  # requests/s of one GPU -> p99 in seconds
    pauses: PausesFound | None
    checked: tuple[Checked, ...]
    notes: tuple[str, ...]


def make_plan(
    runs: Sequence[Observed], ask: Ask, rows: int | None = None, lanes: Sequence[int] = (), *, pauses: bool = True
) -> CapacityPlan:
    """Fit, check, choose, scale. Raises InvalidOption where nothing keeps the bound."""
    model = calibrate(runs, pauses=pauses)
    sizes = {run.setup.rows for run in runs}
    of_request = rows or (sizes.pop() if len(sizes) == 1 else 1)
    choices = choose(model, _tried(runs, of_request, lanes), ask)
    best = choices[0]
    size = request_bytes([run.summary for run in runs], of_request)
    checked = leave_one_out(runs, ask.seed, pauses=pauses)
    return CapacityPlan(
        schema_version=SCHEMA_VERSION,
        machine=machine([run.summary for run in runs]),
        runs=tuple(run.name for run in runs),
        ask=ask,
        bytes=size,
        choices=tuple(choices),
        fleets=tuple(fleet(model, best, rate, ask, size) for rate in dict.fromkeys((ask.rate, *ask.rates))),
        limits=limits(best, ask, size),
        curve=_curve(model, best, ask.seed),
        pauses=_pauses_found(model, runs, best, ask),
        checked=tuple(checked),
        notes=tuple(_notes(runs, of_request, rows, best, checked, size)),
    )


def _tried(runs: Sequence[Observed], rows: int, lanes: Sequence[int]) -> list[Setup]:
    if not runs[0].staged:
        widest = max(runs, key=lambda run: run.setup.lanes).setup
        return [widest]
    depth = Counter(run.setup.depth for run in runs).most_common(1)[0][0]
    buckets = sorted({bucket for run in runs for bucket in run.setup.batching.buckets})
    return setups(buckets, rows, lanes or sorted({run.setup.lanes for run in runs}), depth, padded=runs[0].setup.padded)


def request_bytes(summaries: Sequence[RunSummary], rows: int) -> Bytes:
    """Return what a request of so many rows carries, as the runs say."""
    first = summaries[0]
    if first.target is not None:
        return Bytes(sent=first.target.payload_bytes, answered=None)
    row = math.prod(first.options.row_features) * ITEM_BYTES[first.options.inputs.wire]
    answers = [run.limits.answer_bytes for run in summaries if run.limits is not None]
    return Bytes(sent=float(rows * row), answered=float(rows * answers[0]) if answers else None)


def _curve(model: Calibrated, best: Choice, seed: int) -> dict[float, float]:
    rates = [share * best.requests_per_s for share in DRAWN]
    found = {rate: latency_at(model, best.setup, rate, seed) for rate in rates}
    return {rate: latency.p99 for rate, latency in found.items() if latency is not None}


def _pauses_found(model: Calibrated, runs: Sequence[Observed], best: Choice, ask: Ask) -> PausesFound | None:
    lengths = model.pauses.lengths
    if not len(lengths):
        return None
    without: Latency | None = latency_at(calibrate(runs, pauses=False), best.setup, best.requests_per_s, ask.seed)
    assert without is not None
    return PausesFound(
        per_s=model.pauses.per_s,
        share=model.pauses.share,
        mean_s=float(lengths.mean()),
        max_s=float(lengths.max()),
        p99_without_s=without.p99,
    )


def _notes(
    runs: Sequence[Observed], rows: int, asked: int | None, best: Choice, checked: Sequence[Checked], size: Bytes
) -> list[str]:
    notes = [f"rows of a request: {rows}" + ("" if asked else ", as the runs had (1 where they differ); see --rows")]
    if best.outside:
        notes.append(f"EXTRAPOLATED beyond what was measured: {best.outside}; measure there before relying on it")
    if not runs[0].staged:
        notes.append(
            "the runs show no stages of the server, so each request counts as a batch of its own that shares the server"
            " with the others; other batch sizes than the measured ones cannot be foreseen"
        )
    if size.answered is None:
        notes.append("the runs do not say how large answers are; the network was reckoned with requests alone")
    notes += _accuracy(checked)
    return notes


def _accuracy(checked: Sequence[Checked]) -> list[str]:
    if not checked:
        return ["the runs are of one configuration, so the model's own error is unknown; add runs of another"]
    missed = {name: sum(name in each.missed for each in checked) for name in ("throughput", "p99")}
    told = []
    for name, limit in (("throughput", THROUGHPUT_TARGET), ("p99", P99_TARGET)):
        errors = [abs(getattr(each, f"{name}_error")) for each in checked]
        told.append(
            f"error of predicted {name} on {len(checked)} configurations that it was not fitted to: median"
            f" {np.median(errors):.1%}, worst {max(errors):.0%}; target {limit:.0%}"
            + (f" MISSED on {missed[name]}" if missed[name] else " met on all")
        )
    return told
