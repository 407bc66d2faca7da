"""A run against a server as a person sees it: what happened in the last second, and a table at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.bench.calibration import Calibration
from headrace.bench.lines import Lines
from headrace.bench.present import number
from headrace.bench.stats import Distribution
from headrace.bench.summary import RunSummary
from headrace.clock import now_ns, seconds
from headrace.target.counters import ANSWERED, FAILED, ISSUED, SHED, Interval, Reader


class LiveWatcher:
    """Shows a run on a terminal; elsewhere (a log, CI) a line per stage."""

    def __init__(self, console: Console) -> None:
        self._console, self._lines = console, Lines(console)
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._reader: Reader | None = None
        self._planned: int | None = None
        self._stage = ""
        self._looked_ns = now_ns()
        self._last = Interval(0.0, None, None, 0)

    def __enter__(self) -> LiveWatcher:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tell(self, text: str) -> None:
        self._lines.note(text)

    def stage(self, text: str) -> None:
        self._stage = text
        if not self._console.is_terminal:
            self._lines.timed(text)

    def watch(self, counters: Any, generators: int, planned: int | None) -> None:  # noqa: ANN401
        self._reader = Reader(counters, generators)
        self._planned = planned
        self._looked_ns = now_ns()

    def look(self) -> None:
        if not self._console.is_terminal or self._reader is None:
            return
        passed_s = seconds(now_ns() - self._looked_ns)
        if passed_s >= 1.0:
            self._last = self._reader.interval(passed_s)
            self._looked_ns = now_ns()
        self._live.update(Text(self._line(self._reader), no_wrap=True, overflow="ellipsis"), refresh=True)

    def _line(self, reader: Reader) -> str:
        totals, last = reader.totals(), self._last
        of = f" of {self._planned:,}" if self._planned else ""
        return (
            f"{self._stage} {totals[ISSUED]:,}{of}, answered {totals[ANSWERED]:,}, failed"
            f" {totals[FAILED] + totals[SHED]:,}; last second {last.rate:,.0f}/s,"
            f" p50 {_short(last.p50_s)}, p99 {_short(last.p99_s)}"
        )


def target_table(summary: RunSummary) -> Table:
    """Return what a run showed, a line per metric, with the definition beside each number."""
    metrics, facts = summary.metrics, summary.target
    assert facts is not None
    table = Table(title=f"{summary.experiment}: {summary.options.load.words}", title_justify="left", title_style="bold")
    for name, justify in (("metric", "left"), ("value", "right"), ("what it is", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_row("throughput", number(metrics.throughput_samples_per_s, "samples/s"), "answered / measured time")
    if metrics.goodput_samples_per_s is not None:
        bound_s = summary.options.load.bound_s
        table.add_row("goodput", number(metrics.goodput_samples_per_s, "samples/s"), f"of them within {bound_s:g} s")
    table.add_row("response time", _spread(metrics.response_time), "answer - planned sending: p50, p90, p99, max")
    table.add_row("service time", _spread(metrics.service_time), "answer - actual sending: p50, p90, p99, max")
    table.add_row("issue delay", _spread(metrics.issue_delay), "actual - planned sending: p50, p90, p99, max")
    table.add_row("first answer", number(metrics.warmup_latency_s, "s"), "to the first request of all")
    table.add_section()
    counts = f"{metrics.errors} / {metrics.wrong} / {metrics.shed} / {metrics.unanswered}"
    table.add_row(
        "not answered well", counts, f"errors / wrong / refused / no answer, of {metrics.requests:,} requests"
    )
    server = "-" if facts.server_success is None else f"{facts.server_success:,}"
    table.add_row("server's count", server, "requests that it says it answered")
    check = summary.answers
    if check:
        table.add_row(
            "right answers",
            f"{check.checked_rows - check.wrong_rows:,} of {check.checked_rows:,}",
            f"rows equal to {facts.compared_with}; error {check.max_error:.1e} of {check.tolerance:.0e} allowed",
        )
    shares = " / ".join(f"{share:.0%}" for share in facts.client_cpu_share)
    table.add_row("client CPU", shares, f"of a core, by generator; {facts.connections} connections at most")
    return table


def _short(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.3g} ms"


def _spread(times: Distribution | None) -> str:
    if times is None:
        return "-"
    return " / ".join(f"{value * 1e3:.4g}" for value in (times.p50, times.p90, times.p99, times.max)) + " ms"


def calibration_tables(made: Calibration) -> tuple[Table, ...]:
    """Return what a calibration says: how far off it was, how late, and how much it can do."""
    errors = Table(title=f"measured against truth, over {made.transport}", title_justify="left", title_style="bold")
    for name in ("law", "requests/s", "bytes", "true p50, p99", "p50 off by", "p99 off by", "throughput off by"):
        errors.add_column(name, justify="left" if name == "law" else "right", overflow="fold")
    for each in made.recovered:
        errors.add_row(
            each.law,
            f"{each.rate:g}",
            f"{each.payload_bytes:,}",
            f"{each.true_p50_s * 1e3:.4g}, {each.true_p99_s * 1e3:.4g} ms",
            *(f"{error:+.2%}" for error in (each.p50_error, each.p99_error, each.throughput_error)),
        )
    slip = made.slip
    late = " / ".join(f"{value * 1e6:,.1f}" for value in (slip.p50, slip.p90, slip.p99, slip.max))
    ceilings = Table(
        title=f"ceiling; sent late by {late} us: p50, p90, p99, max", title_justify="left", title_style="bold"
    )
    for name in ("bytes", "requests/s", "bytes/s", "one by itself: p50, p99"):
        ceilings.add_column(name, justify="right")
    for ceiling in made.ceilings:
        ceilings.add_row(
            f"{ceiling.payload_bytes:,}",
            f"{ceiling.requests_per_s:,.0f}",
            f"{ceiling.requests_per_s * ceiling.payload_bytes / 1e9:.3g} GB/s",
            f"{ceiling.p50_s * 1e3:.3g}, {ceiling.p99_s * 1e3:.3g} ms",
        )
    return errors, ceilings
