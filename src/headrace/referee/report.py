"""The referee's result: as JSON, as a page of Markdown, and as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from headrace.bench.summary import Environment
from headrace.referee.agree import OWN_NOISE, Judged, ratio, rows, show
from headrace.referee.cases import LOADGEN, OURS, Settings
from headrace.referee.found import Basis, Found

SCHEMA_VERSION = 1
JSON_NAME, PAGE_NAME = "referee.json", "referee.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    schema_version: int
    started_at: str  # UTC, ISO 8601
    command: tuple[str, ...]
    environment: Environment
    versions: dict[str, str]  # of the other tools
    url: str  # a law's, where the truth is known
    model: str
    settings: Settings
    cases: tuple[Judged, ...]
    notes: tuple[str, ...] = ()


def tables(report: Report) -> Iterator[Table]:
    """Return a table for each load: a line per quantity, a column per tool, ratios to ours behind the numbers."""
    for judged in report.cases:
        table = Table(title=f"{judged.name}: {judged.words}", title_justify="left", title_style="bold")
        table.add_column("quantity", overflow="fold")
        for found in judged.found:
            table.add_column(found.tool, justify="right", overflow="fold")
        for name, cells in _lines(judged):
            table.add_row(name, *cells)
        yield table


def page(report: Report) -> str:
    """Return the page."""
    settings = report.settings
    tools = ", ".join(f"{name} {version}" for name, version in report.versions.items()) or "no other tool"
    lines = [
        "# The same server under several load generators",
        "",
        f"Server: `{report.url}`, model `{report.model}`. Headrace {report.environment.headrace}, {tools}.",
        f"{report.environment.cpu_model}, {report.environment.cpu_count} CPUs; {report.started_at}.",
        f"Command: `{' '.join(report.command)}`.",
        "",
        f"Behind each number stands its ratio to ours. A number disagrees if that differs from 1 by more than"
        f" {settings.threshold:.0%} and by more than {OWN_NOISE:g} times what our own two runs, before and after the"
        " others, differ by. *From schedule* and *from send* are computed here, from each tool's own records; beside"
        " what a tool prints, ratios are to our throughput and to our time from schedule. Percentiles that are printed"
        " are one of the values, ours lie between two.",
    ]
    for judged in report.cases:
        lines += ["", f"## {judged.name}: {judged.words}", "", *_markdown(judged), ""]
        lines += [f"- {sentence}" for sentence in judged.disagreements] or ["No disagreement."]
        cost = _cost(judged.of(LOADGEN))
        lines += ["", cost] if cost else []
    lines += ["", *(f"Note: {note}" for note in report.notes)] if report.notes else []
    return "\n".join(lines) + "\n"


def _markdown(judged: Judged) -> Iterator[str]:
    yield "| quantity | " + " | ".join(found.tool for found in judged.found) + " |"
    yield "|---|" + "---:|" * len(judged.found)
    for name, cells in _lines(judged):
        yield f"| {name} | " + " | ".join(cells) + " |"


def _lines(judged: Judged) -> Iterator[tuple[str, list[str]]]:
    yield "requests", [f"{found.requests:,}" if found.requests else "-" for found in judged.found]
    for basis, name in rows(judged):
        words = f"{name} {basis}" if basis != "computed" else name
        yield words, [_cell(judged, found, basis, name) for found in judged.found]


def _cell(judged: Judged, found: Found, basis: Basis, name: str) -> str:
    value = found.value(basis, name)
    if value is None:
        return "-"
    against = None if found.tool == OURS else ratio(judged, found, basis, name)
    return show(name, value) + ("" if against is None else f" ({against:.3f})")


def _cost(found: Found | None) -> str:
    if found is None or found.own_cost is None:
        return ""
    cost = found.own_cost
    numbers = ", ".join(f"{value * 1e3:.3g}" for value in (cost.p50, cost.p99, cost.max))
    return (
        "Between mlcommons-loadgen and the connections, handing over and back, a request spends (p50, p99, max)"
        f" {numbers} ms, which are in what it prints and in its times above."
    )
