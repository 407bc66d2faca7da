"""A run as a person sees it: progress while it goes on, a table when it is done."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from headrace.bench.classify import Labelled
from headrace.bench.lines import Lines
from headrace.bench.stats import Distribution
from headrace.bench.summary import RunSummary


class RichWatcher:
    """Shows a run on a terminal; elsewhere (a log, CI) a line per stage."""

    def __init__(self, console: Console) -> None:
        self._lines = Lines(console)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._measuring = False

    def __enter__(self) -> RichWatcher:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, text: str) -> None:
        self._lines.note(text)

    def stage(self, text: str) -> None:
        if self._bar.disable:
            self._lines.timed(text)
        elif self._task is None:
            self._task = self._bar.add_task(text, total=None)
        else:
            self._bar.update(self._task, description=text)

    def progress(self, issued: int, answered: int, total: int) -> None:
        if issued > 1 and not self._measuring:
            self._measuring = True
            self.stage("serving")
        if self._task is not None and issued:
            self._bar.update(self._task, completed=answered, total=total)


def summary_table(summary: RunSummary) -> Table:
    """Return what one run showed, a line per metric, with the definition beside each number."""
    options, metrics = summary.options, summary.metrics
    compiled = "compiled" if options.model.compile else "not compiled"
    table = Table(
        title=f"{summary.experiment}: {options.model.name}, {compiled}, {options.precision},"
        f" batch size {options.inputs.batch_size}, {device_name(summary)}",
        title_justify="left",
        title_style="bold",
    )
    for name, justify in (("metric", "left"), ("value", "right"), ("what it is", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in (*_latency_lines(summary), *_engine_lines(summary), *_efficiency_lines(summary)):
        table.add_row(*line)
    table.add_section()
    for line in _activity_lines(summary):
        table.add_row(*line)
    table.add_section()
    check = summary.answers
    if check:
        right = f"{check.checked_rows - check.wrong_rows} of {check.checked_rows}"
        table.add_row(
            "right answers",
            right,
            f"rows equal to the eager model's; largest error {check.max_error:.1e} of {check.tolerance:.0e} allowed"
            + ("" if check.top1_agreement is None else f"; same class first in {check.top1_agreement:.2%}"),
        )
    table.add_row("errors", str(metrics.errors), f"of {metrics.requests} measured requests")
    return table


def label_table(labelled: Sequence[Labelled], summary: RunSummary) -> Table:
    """Return photographs with their labels, best first."""
    table = Table(
        title=f"{summary.options.model.name} on {device_name(summary)}, through {summary.experiment}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("photograph")
    table.add_column("labels that the server gave")
    for item in labelled:
        labels = ", ".join(f"{label.name} {label.probability:.0%}" for label in item.labels)
        table.add_row(item.photograph.name, labels)
    return table


def device_name(summary: RunSummary) -> str:
    return summary.environment.device_name(summary.options.device)


def _latency_lines(summary: RunSummary) -> list[tuple[str, str, str]]:
    metrics = summary.metrics
    parts = ", ".join(f"{name} {value:.2f}" for name, value in summary.warmup_parts_s.items())
    return [
        (
            "throughput",
            number(metrics.throughput_samples_per_s, "samples/s"),
            "samples answered / measured time",
        ),
        ("warm-up latency", number(metrics.warmup_latency_s, "s"), parts),
        ("response time", _spread(metrics.response_time), "answer - planned sending: mean, p50, p99, max"),
        ("service time", _spread(metrics.service_time), "answer - actual sending: mean, p50, p99, max"),
        ("issue delay", _spread(metrics.issue_delay), "actual - planned sending: mean, p50, p99, max"),
        *_goodput_lines(summary),
    ]


def _goodput_lines(summary: RunSummary) -> list[tuple[str, str, str]]:
    bound_s, goodput = summary.options.load.bound_s, summary.metrics.goodput_samples_per_s
    if bound_s is None:
        return []
    return [("goodput", number(goodput, "samples/s"), f"of right answers within {bound_s * 1e3:g} ms of their plan")]


def _engine_lines(summary: RunSummary) -> list[tuple[str, str, str]]:
    return [
        (
            each.place,
            number(each.samples_per_s, "samples/s"),
            f"{each.requests} requests" + ("" if each.share is None else f", {each.share:.1%} of the rows"),
        )
        for each in summary.engines
    ]


def _efficiency_lines(summary: RunSummary) -> list[tuple[str, str, str]]:
    efficiency = summary.efficiency
    if efficiency is None:
        return []
    limit = number(efficiency.limit_samples_per_s, "samples/s")
    return [
        ("efficiency", f"{efficiency.ratio:.3f}", f"of {limit}, measured after it; what binds: {efficiency.binding}")
    ]


def _activity_lines(summary: RunSummary) -> list[tuple[str, str, str]]:
    activity = summary.activity
    lines = [
        ("CPU", activity.cpu_utilization_pct, "%", "of all logical CPUs of the machine"),
        ("utilization.gpu", activity.gpu_utilization_pct, "%", "share of time with any kernel running"),
        ("SM activity", activity.sm_activity_pct, "%", "multiprocessors with work"),
        ("tensor activity", activity.tensor_activity_pct, "%", "tensor pipes busy"),
        ("DRAM activity", activity.dram_activity_pct, "%", "of the memory's bandwidth"),
        ("PCIe to the GPU", _scaled(activity.pcie_rx_bytes_per_s, 1e-9), "GB/s", "as the GPU counted it"),
        ("power", activity.power_w, "W", "energy counter over the measured time"),
        ("GPU memory", _scaled(activity.gpu_memory_used_bytes, 1e-9), "GB", "largest seen"),
    ]
    shown = [(name, number(value, unit), text) for name, value, unit, text in lines if value is not None]
    if activity.throttle_reasons:
        shown.append(("throttled", "yes", ", ".join(activity.throttle_reasons)))
    return shown


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def number(value: float | None, unit: str) -> str:
    """Return a value as tables show it, three digits or more, and "-" for what is unknown."""
    return "-" if value is None else f"{value:,.1f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _spread(times: Distribution | None) -> str:
    if times is None:
        return "-"
    return " / ".join(f"{value:.4g}" for value in (times.mean, times.p50, times.p99, times.max)) + " s"
