"""The limits as a person sees them: steps while they are measured, a table for each kind when that is done."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from headrace.bench.limits_report import BatchLimits, LimitsReport
from headrace.bench.lines import Lines

BEST = "*"


class RichSteps:
    """Shows the steps on a terminal; elsewhere (a log, CI) a line for each."""

    def __init__(self, console: Console) -> None:
        self._console, self._lines = console, Lines(console)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichSteps:
        self._bar.start()
        if self._console.is_terminal:
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, text: str, number: int, of: int) -> None:
        """See `limits_run.StepWatcher`."""
        if self._task is not None:
            self._bar.update(self._task, description=text, completed=number, total=of)
        else:
            self._lines.timed(f"{number + 1} of {of}: {text}")


def tables(report: LimitsReport) -> Iterator[Group]:
    """Yield a table for each kind of limit, and at last which one binds."""
    measured = report.batches[0].measured
    yield _titled(f"The model alone, in samples/s ({BEST} best): {report.title}; {report.form}", _forward_table(report))
    if measured.h2d_bytes_per_s is not None:
        yield _titled("Copies between pinned memory and the device", _copy_table(report))
    size = f"{report.memcpy_buffer_bytes >> 20} MiB, a sample being {measured.row_bytes:,} bytes"
    yield _titled(f"Copies within the host's memory, between buffers of {size}", _memcpy_table(report))
    yield _titled("Ring messages: a byte there and its answer back, between two processes", _ring_table(report))
    yield _titled("What binds: no server of this model, one batch to a request, is faster here", _binding_table(report))


def _titled(title: str, table: Table) -> Group:
    """A table's own title would be broken into lines of the table's width."""
    return Group(Text(title, style="bold"), table, "")


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _forward_table(report: LimitsReport) -> Table:
    streams = sorted({count for each in report.batches for count in each.measured.forward_samples_per_s})
    plural = [f"{count} stream{'s' * (count > 1)}" for count in streams]
    table = _table("batch size", *plural)
    for each in report.batches:
        rates = each.measured.forward_samples_per_s
        best = max(rates, key=rates.__getitem__)
        cells = [_best(rates.get(count), best=count == best) for count in streams]
        table.add_row(str(each.measured.bucket), *cells)
    return table


def _best(rate: float | None, *, best: bool) -> str:
    if rate is None:
        return "-"
    return f"[bold]{number(rate)}{BEST}[/bold]" if best else number(rate) + " " * len(BEST)


def _copy_table(report: LimitsReport) -> Table:
    measured = report.batches[0].measured
    table = _table("direction", "GB/s", "bytes a sample", "samples/s")
    for name, speed, size in (
        ("to the device", measured.h2d_bytes_per_s, measured.row_bytes),
        ("from the device", measured.d2h_bytes_per_s, measured.answer_bytes),
    ):
        if speed is not None:
            table.add_row(name, f"{speed / 1e9:.1f}", f"{size:,}", number(speed / size))
    return table


def _memcpy_table(report: LimitsReport) -> Table:
    measured = report.batches[0].measured
    table = _table("threads", "GB/s", "samples/s")
    rates = measured.memcpy_bytes_per_s
    fastest = max(rates.values())
    for threads, speed in rates.items():
        samples = _best(speed / measured.row_bytes, best=speed == fastest)
        table.add_row(str(threads), f"{speed / 1e9:.1f}", samples)
    return table


def _ring_table(report: LimitsReport) -> Table:
    ring = report.ring
    table = _table("unanswered at once", "requests/s", "us each")
    for many, rate in ((1, ring.one_at_a_time_per_s), (ring.in_flight, ring.many_at_once_per_s)):
        table.add_row(str(many), number(rate), f"{1e6 / rate:.1f}")
    return table


def _binding_table(report: LimitsReport) -> Table:
    table = _table("batch size", "client that copies", "samples/s", "zero-copy client", "samples/s")
    for each in report.batches:
        table.add_row(str(each.measured.bucket), *_bound(each))
    return table


def _bound(each: BatchLimits) -> Iterator[str]:
    for binding in (each.binding, each.binding_in_place):
        yield binding.name
        yield f"[bold]{number(binding.samples_per_s)}[/bold]"


def number(value: float) -> str:
    """Return a rate with three digits at least, and thousands told apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
