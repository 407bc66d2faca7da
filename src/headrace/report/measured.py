"""Every number of a report, computed by `bench.stats` from the records of a cell's runs; what is wrong with a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import msgspec
import numpy as np

from headrace.bench import stats, validity
from headrace.bench.record import PHASES, Records, measured
from headrace.bench.summary import Activity, Efficiency
from headrace.clock import seconds
from headrace.errors import OutputError
from headrace.report.cells import Cell
from headrace.report.read import BURST, Run, Telemetry, Unreadable, records_of, telemetry_of
from headrace.report.reduce import Envelope, Tail, batch_sizes, envelope, stage_means_s, tail
from headrace.report.spans import (
    Timeline,
    busiest_window,
    device_timeline,
    find_trace,
    host_timeline,
    join_touching,
    read_spans,
)

TOLERANCE = 1e-9  # relative: a summary's numbers are float64 of the same integers
PARTS_TOLERANCE = 1e-6
TRACE_WINDOW_US = 8000.0
PIXELS = 400  # spans that are nearer than one of so many parts of a window are drawn as one


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNumbers:
    """One run, from its records. `reasons` say why it does not count; `remarks` what else a reader must know."""

    run: Run
    metrics: stats.Metrics
    gpu_pct: float | None  # mean of the polled samples in the window
    efficiency: Efficiency | None
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def counts(self) -> bool:
        return not self.reasons

    @property
    def throughput(self) -> float | None:
        return self.metrics.throughput_samples_per_s

    @property
    def warmup_parts_s(self) -> dict[str, float]:
        return self.run.summary.warmup_parts_s

    @property
    def activity(self) -> Activity:
        return self.run.summary.activity


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One run of a cell, over time: the one with the longest response, so that what stalled is seen."""

    run_name: str
    by_schedule: bool  # response against when it was planned; else against when it came
    response: Envelope
    service: Envelope
    zero_ns: int
    window_s: float
    telemetry: Telemetry | None
    timeline: Timeline | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CellNumbers:
    """A cell. Distributions hold all values of all runs that count; None without such a run."""

    cell: Cell
    runs: tuple[RunNumbers, ...]
    response: Tail | None
    service: Tail | None
    issue_delay: Tail | None
    stages_s: tuple[float, ...] | None  # mean of each stage over those runs' requests
    batches: dict[int, float]  # how many of each number of rows
    detail: Detail | None

    @property
    def good(self) -> tuple[RunNumbers, ...]:
        return tuple(run for run in self.runs if run.counts)

    @property
    def throughputs(self) -> tuple[float, ...]:
        return known([run.throughput for run in self.good])

    @property
    def throughput(self) -> float | None:
        return mean([run.throughput for run in self.good])

    @property
    def goodput(self) -> float | None:
        return mean([run.metrics.goodput_samples_per_s for run in self.runs])

    @property
    def efficiency(self) -> float | None:
        return mean([run.efficiency.ratio if run.efficiency else None for run in self.good])

    @property
    def binds(self) -> str:
        return ", ".join(sorted({run.efficiency.binding for run in self.good if run.efficiency}))

    @property
    def errors(self) -> int:
        """Requests that failed, were answered wrongly or never, over all runs."""
        return sum(run.metrics.errors + run.metrics.wrong + run.metrics.unanswered for run in self.runs)

    @property
    def warmup_s(self) -> float | None:
        return middle([run.metrics.warmup_latency_s for run in self.good])

    @property
    def warmup_run(self) -> RunNumbers | None:
        """Return the run whose warm-up latency is the (lower) median; its parts are shown."""
        timed = [(run.metrics.warmup_latency_s, at, run) for at, run in enumerate(self.good)]
        ordered = sorted((took, at, run) for took, at, run in timed if took is not None)
        return ordered[(len(ordered) - 1) // 2][2] if ordered else None


def known(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def mean(values: Sequence[float | None]) -> float | None:
    return fmean(known(values)) if known(values) else None


def middle(values: Sequence[float | None]) -> float | None:
    return median(known(values)) if known(values) else None


def compute_cell(cell: Cell, bound_s: float | None) -> tuple[CellNumbers | None, list[Unreadable]]:
    """Read a cell's runs one after another and keep what is shown. Runs that cannot be read are named, not shown."""
    runs: list[RunNumbers] = []
    lost: list[Unreadable] = []
    pools = _Pools()
    for run in cell.runs:
        try:
            records = records_of(run)
            telemetry = telemetry_of(run)
            numbers = compute_run(run, records, telemetry, bound_s)
            if numbers.counts:
                pools.add(numbers, _answered(records), telemetry)
        except OutputError as error:
            lost.append(Unreadable(name=run.name, reason=str(error)))
        else:
            runs.append(numbers)
    return (pools.numbers(cell, runs) if runs else None), lost


class _Pools:
    """Gathers the values of a cell's runs that count."""

    def __init__(self) -> None:
        self._response: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._service: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._delay: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._stages: list[tuple[float, ...]] = []
        self._weights: list[int] = []
        self._batches: Counter[int] = Counter()
        self._detail: Detail | None = None
        self._longest_ns = -1

    def add(self, numbers: RunNumbers, records: Records, telemetry: Telemetry | None) -> None:
        scheduled, issued, completed = (records[f"{name}_ns"] for name in ("scheduled", "issued", "completed"))
        response = completed - scheduled
        if numbers.metrics.response_time is not None:
            self._response.append(response)
            self._service.append(completed - issued)
            self._delay.append(issued - scheduled)
        stages = stage_means_s(records)
        if stages:
            self._stages.append(stages)
            self._weights.append(len(records))
        for size, count in batch_sizes(records).items():
            self._batches[size] += count  # type: ignore[assignment]  # parts of batches add up to whole ones
        if int(response.max()) > self._longest_ns:
            self._longest_ns = int(response.max())
            self._detail = _detail(numbers.run, records, telemetry)

    def numbers(self, cell: Cell, runs: Sequence[RunNumbers]) -> CellNumbers:
        stages = np.average(np.array(self._stages), axis=0, weights=self._weights) if self._stages else None
        return CellNumbers(
            cell=cell,
            runs=tuple(runs),
            response=_pooled(self._response),
            service=_pooled(self._service),
            issue_delay=_pooled(self._delay),
            stages_s=None if stages is None else tuple(float(stage) for stage in stages),
            batches=dict(sorted(self._batches.items())),
            detail=self._detail,
        )


def compute_run(run: Run, records: Records, telemetry: Telemetry | None, bound_s: float | None) -> RunNumbers:
    """Compute a run's numbers. `bound_s` takes the place of the latency bound that the run was made with."""
    target = run.summary.target
    judged = validity.judge(records, run.load, target.server_success if target else None)
    metrics, verdict = judged.metrics, judged.verdict
    reasons = tuple(_reasons(run, metrics, verdict))
    if bound_s is not None:
        metrics = replace(metrics, goodput_samples_per_s=stats.compute(records, bound_s).goodput_samples_per_s)
    limits, throughput = run.summary.limits, metrics.throughput_samples_per_s
    copies = run.summary.options.transport.client == "copy"
    efficiency = Efficiency.of(throughput, limits, client_copies=copies) if limits and throughput else None
    return RunNumbers(
        run=run,
        metrics=metrics,
        gpu_pct=_gpu_pct(records, telemetry),
        efficiency=efficiency,
        reasons=reasons,
        remarks=tuple(_remarks(run, metrics, efficiency, verdict)),
    )


def _answered(records: Records) -> Records:
    answered: Records = records[(records["phase"] == PHASES.index("measured")) & (records["status"] == stats.OK)]
    return answered


def _gpu_pct(records: Records, telemetry: Telemetry | None) -> float | None:
    counted = measured(records)
    answered = counted["completed_ns"][counted["completed_ns"] > 0]
    if telemetry is None or not len(answered):
        return None
    within = (telemetry.at_ns >= counted["issued_ns"].min()) & (telemetry.at_ns <= answered.max())
    values = telemetry.gpu_pct[within & ~np.isnan(telemetry.gpu_pct)]
    return float(values.mean()) if len(values) else None


def _reasons(run: Run, metrics: stats.Metrics, verdict: validity.Verdict) -> list[str]:
    """Return why a run does not count, most telling first."""
    found = [run.summary.error] if run.summary.error else []
    counts = {"failed": metrics.errors, "wrongly answered": metrics.wrong, "never answered": metrics.unanswered}
    counts["refused for want of room"] = metrics.shed
    found += [f"{count:,} of {metrics.requests:,} requests {what}" for what, count in counts.items() if count]
    if run.summary.answers and run.summary.answers.wrong_rows:
        check = run.summary.answers
        found.append(f"{check.wrong_rows:,} of {check.checked_rows:,} rows differ from the eager model's answer")
    if not metrics.requests:
        found.append("no measured request")
    found += [f"the summary disagrees with the records: {line}" for line in disagreements(run, metrics)]
    found += verdict.voids
    if not found and metrics.throughput_samples_per_s is None:
        found.append("no throughput")
    return list(dict.fromkeys(found))


def _remarks(run: Run, metrics: stats.Metrics, efficiency: Efficiency | None, verdict: validity.Verdict) -> list[str]:
    found = list(dict.fromkeys((*verdict.marks, *run.summary.marks, *run.summary.notes)))
    parts, whole = math.fsum(run.summary.warmup_parts_s.values()), metrics.warmup_latency_s
    if run.summary.warmup_parts_s and whole is not None and not math.isclose(parts, whole, rel_tol=PARTS_TOLERANCE):
        found.append(f"the parts of the warm-up latency sum to {parts:.6g} s, the records say {whole:.6g} s")
    told = run.summary.efficiency
    if told and efficiency and not math.isclose(told.ratio, efficiency.ratio, rel_tol=TOLERANCE):
        found.append(f"the summary's efficiency is {told.ratio:.4f}, computed from the records {efficiency.ratio:.4f}")
    return found


def disagreements(run: Run, metrics: stats.Metrics) -> list[str]:
    """Return where the summary's metrics are not those of the records, each with both values."""
    recomputed: dict[str, object] = msgspec.to_builtins(metrics)
    flat_told, flat_recomputed = _flat(run.facts.metrics), _flat(recomputed)
    return [
        f"{name} is {flat_told[name]} there and {value} here"
        for name, value in flat_recomputed.items()
        if name in flat_told and not _equal(flat_told[name], value)
    ]


def _flat(values: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _equal(told: object, computed: object) -> bool:
    if isinstance(told, int | float) and isinstance(computed, int | float):
        return math.isclose(told, computed, rel_tol=TOLERANCE, abs_tol=1e-12)
    return told == computed


def _detail(run: Run, records: Records, telemetry: Telemetry | None) -> Detail:
    scheduled, issued, completed = (records[f"{name}_ns"] for name in ("scheduled", "issued", "completed"))
    zero_ns = int(scheduled.min())
    by_schedule = run.load.kind != BURST
    at_ns = scheduled if by_schedule else completed
    return Detail(
        run_name=run.name,
        by_schedule=by_schedule,
        response=envelope(at_ns, completed - scheduled, zero_ns),
        service=envelope(at_ns, completed - issued, zero_ns),
        zero_ns=zero_ns,
        window_s=seconds(int(completed.max()) - zero_ns),
        telemetry=telemetry,
        timeline=_timeline(run, records),
    )


def _timeline(run: Run, records: Records) -> Timeline | None:
    trace = find_trace(run.folder)
    spans = read_spans(trace) if trace else []
    if not spans:
        return host_timeline(records)
    begin_us = busiest_window(spans, TRACE_WINDOW_US)
    return join_touching(device_timeline(spans, begin_us, TRACE_WINDOW_US), TRACE_WINDOW_US / PIXELS / 4)


def _pooled(parts: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tail | None:
    return tail(np.concatenate(parts)) if parts else None
