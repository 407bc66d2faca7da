"""A run against a server as a person sees it: what happened in the last second, and a table at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.bench.stats import Distribution
from headrace.bench.summary import RunSummary
from headrace.clock import now_ns, seconds
from headrace.target.counters import ANSWERED, ISSUED, Interval, Reader


class LiveWatcher:
    """Shows a run on a terminal; elsewhere (a log, CI) a line per stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._reader: Reader | None = None
        self._planned: int | None = None
        self._stage = ""
        self._start_ns = self._looked_ns = now_ns()
        self._last = Interval(0.0, None, None, 0)

    def __enter__(self) -> LiveWatcher:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tell(self, text: str) -> None:
        self._console.print(f"note: {text}", style="yellow", highlight=False, markup=False)

    def stage(self, text: str) -> None:
        self._stage = text
        if not self._console.is_terminal:
            elapsed_s = seconds(now_ns() - self._start_ns)
            self._console.print(f"[{elapsed_s:6.1f} s] {text}", highlight=False, markup=False)

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
        self._live.update(Text(self._line(self._reader)), refresh=True)

    def _line(self, reader: Reader) -> str:
        totals, last = reader.totals(), self._last
        of = f" of {self._planned:,}" if self._planned else ""
        words = [
            f"{self._stage}: {totals[ISSUED]:,}{of} sent, {totals[ANSWERED]:,} answered",
            f"last second: {last.rate:,.0f}/s",
            f"p50 {_short(last.p50_s)}",
            f"p99 {_short(last.p99_s)}",
            f"{last.failed:,} failed",
        ]
        return "  ".join(words)


def target_table(summary: RunSummary) -> Table:
    """Return what a run showed, a line per metric, with the definition beside each number."""
    metrics, facts = summary.metrics, summary.target
    assert facts is not None
    table = Table(title=f"{summary.experiment}: {_load(summary)}", title_justify="left", title_style="bold")
    for name, justify in (("metric", "left"), ("value", "right"), ("what it is", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_row("throughput", _number(metrics.throughput_samples_per_s, "samples/s"), "answered / measured time")
    if metrics.goodput_samples_per_s is not None:
        bound_s = summary.options.load.bound_s
        table.add_row("goodput", _number(metrics.goodput_samples_per_s, "samples/s"), f"of them within {bound_s:g} s")
    table.add_row("response time", _spread(metrics.response_time), "answer - planned sending: p50, p90, p99, max")
    table.add_row("service time", _spread(metrics.service_time), "answer - actual sending: p50, p90, p99, max")
    table.add_row("issue delay", _spread(metrics.issue_delay), "actual - planned sending: p50, p90, p99, max")
    table.add_row("first answer", _number(metrics.warmup_latency_s, "s"), "to the first request of all")
    table.add_section()
    counts = f"{metrics.errors} / {metrics.wrong} / {metrics.shed} / {metrics.unanswered}"
    table.add_row("not answered well", counts, f"errors / wrong / refused / no answer, of {metrics.requests:,} requests")
    server = "-" if facts.server_success is None else f"{facts.server_success:,}"
    table.add_row("server's count", server, "requests that it says it answered")
    check = summary.answers
    if check:
        table.add_row(
            "right answers",
            f"{check.checked_rows - check.wrong_rows:,} of {check.checked_rows:,}",
            f"rows equal to {facts.compared_with}; largest error {check.max_error:.1e} of {check.tolerance:.0e} allowed",
        )
    shares = " / ".join(f"{share:.0%}" for share in facts.client_cpu_share)
    table.add_row("client CPU", shares, f"of a core, by generator; {facts.connections} connections at most")
    return table


def _load(summary: RunSummary) -> str:
    load, target = summary.options.load, summary.options.target
    assert target is not None
    words = {"closed": f"{load.concurrency} in flight", "burst": "all at once"}
    rate = f"{load.rate:g} requests/s, {load.kind}" if load.rate else load.kind
    return f"{words.get(load.kind, rate)}, {target.generators} generators"


def _short(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.3g} ms"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.1f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _spread(times: Distribution | None) -> str:
    if times is None:
        return "-"
    return " / ".join(f"{value * 1e3:.4g}" for value in (times.p50, times.p90, times.p99, times.max)) + " ms"
