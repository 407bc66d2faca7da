"""A plan as tables: once as rows of words, which a terminal and a Markdown page both show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from headrace.planning.fleet import Fleet, Latency
from headrace.planning.holdout import Checked
from headrace.planning.plan import CapacityPlan


@dataclass(frozen=True, slots=True)
class Words:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page_tables(plan: CapacityPlan) -> list[Words]:
    return [*_tables(plan), *accuracy(plan.checked)]


def screen_tables(plan: CapacityPlan) -> list[Words]:
    """Return what a terminal has room for: of the model's own errors those beyond their targets."""
    return [*_tables(plan), *_missed(plan.checked)]


def _tables(plan: CapacityPlan) -> list[Words]:
    return [_fleets(plan), _spare(plan), _setups(plan), _ecdf(plan), _limits(plan)]


def for_terminal(words: Words) -> Table:
    table = Table(title=words.title, title_justify="left")
    for number, column in enumerate(words.columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in words.rows:
        table.add_row(*row)
    return table


def as_markdown(plan: CapacityPlan, command: Sequence[str]) -> str:
    """Return the plan as a page."""
    parts = [
        f"# Plan: {plan.ask.rate:,.0f} requests/s, p99 within {_ms(plan.ask.bound_s)} ms",
        f"Command: `{' '.join(command)}`",
        f"From {len(plan.runs)} runs. {plan.machine}.",
        "\n".join(f"- {note}" for note in (*plan.notes, *pause_notes(plan))),
        *map(markdown_table, page_tables(plan)),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(words: Words) -> str:
    lines = [f"## {words.title}", "", _line(words.columns), _line(["---"] * len(words.columns))]
    return "\n".join([*lines, *map(_line, words.rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def pause_notes(plan: CapacityPlan) -> list[str]:
    found = plan.pauses
    if found is None:
        return ["no pauses of the host were seen, or they were left out; p99 has none in it"]
    return [
        "pauses of the host are in all latencies, as the runs have them together:"
        f" {found.per_s:.3g} per second of {_ms(found.mean_s)} ms (longest {_ms(found.max_s)}), {found.share:.1%}"
        f" of the time. Without any, p99 of one GPU at its rate would be {_ms(found.p99_without_s)} ms"
    ]


def _fleets(plan: CapacityPlan) -> Words:
    best = plan.choices[0]
    columns = ("requests/s", "GPUs", "nodes", "proxies", "set by", "p50 ms", "p90 ms", "p99 ms", "GPU-hours/million")
    rows = tuple(
        (
            f"{each.rate:,.0f}",
            f"{each.gpus:,}",
            f"{each.nodes:,}",
            "" if each.proxies is None else f"{each.proxies:,}",
            each.bound_by,
            *_latency(each.latency),
            f"{each.gpu_hours_per_million:.4g}",
            *([] if each.cost_per_million is None else [f"{each.cost_per_million:.4g}"]),
        )
        for each in plan.fleets
    )
    cost = () if plan.ask.gpu_hour_cost is None else ("cost/million",)
    return Words(f"GPUs by rate, each with {best.setup.words}", (*columns, *cost), rows)


def _spare(plan: CapacityPlan) -> Words:
    def row(each: Fleet) -> tuple[str, ...]:
        lost = ("overloaded", "", "") if each.degraded is None else _latency(each.degraded)
        keeps = each.degraded is not None and each.degraded.p99 <= plan.ask.bound_s
        return (f"{each.rate:,.0f}", f"{each.gpus:,}", *lost, "yes" if keeps else "no", f"{each.gpus_with_spare:,}")

    columns = ("requests/s", "GPUs", "p50 ms", "p90 ms", "p99 ms", "keeps the bound", "GPUs that keep it")
    title = f"When one node of {plan.ask.gpus_per_node} GPUs fails"
    return Words(title, columns, tuple(map(row, plan.fleets)))


def _setups(plan: CapacityPlan) -> Words:
    rows = tuple(
        (
            each.setup.words,
            f"{each.requests_per_s:,.0f}",
            f"{each.most_requests_per_s:,.0f}",
            *_latency(each.latency),
            "extrapolated" if each.outside else "",
        )
        for each in plan.choices
    )
    columns = ("setup", "requests/s within the bound", "at most", "p50 ms", "p90 ms", "p99 ms", "")
    return Words("One GPU: the best setup, and the best of other largest buckets", columns, rows)


def _ecdf(plan: CapacityPlan) -> Words:
    latency = plan.choices[0].latency
    rows = tuple((f"{name} %", _ms(seconds)) for name, seconds in latency.ecdf.items())
    return Words("Distribution of latency at one GPU's rate", ("of requests", "within ms"), rows)


def _limits(plan: CapacityPlan) -> Words:
    first = next(iter(plan.limits))
    rows = tuple(
        (name, f"{rate:,.0f}", "met first" if name == first and len(plan.limits) > 1 else "")
        for name, rate in plan.limits.items()
    )
    return Words("What a growing rate meets first", ("part", "requests/s", ""), rows)


def accuracy(checked: Sequence[Checked]) -> list[Words]:
    """Return the table of the model's own errors, where there are any."""
    if not checked:
        return []
    columns = (
        "held out",
        "runs",
        "rows/s measured",
        "predicted",
        "error",
        "p50 ms",
        "predicted",
        "error",
        "p99 ms",
        "predicted",
        "error",
        "pauses",
        "target missed",
    )
    rows = tuple(
        (
            each.cell + (" (extrapolated)" if each.outside else ""),
            str(each.runs),
            f"{each.throughput_samples_per_s:,.0f}",
            f"{each.predicted_samples_per_s:,.0f}",
            f"{each.throughput_error:+.1%}",
            _ms(each.p50_s),
            _ms(each.predicted_p50_s),
            f"{each.p50_error:+.0%}",
            _ms(each.p99_s),
            _ms(each.predicted_p99_s),
            f"{each.p99_error:+.0%}",
            f"{each.pauses_share:.1%}",
            ", ".join(each.missed),
        )
        for each in checked
    )
    return [Words("The model's own error: each configuration predicted from all others", columns, rows)]


def _missed(checked: Sequence[Checked]) -> list[Words]:
    missed = [each for each in checked if each.missed]
    if not missed:
        return []
    rows = tuple((each.cell, f"{each.throughput_error:+.1%}", f"{each.p99_error:+.0%}") for each in missed)
    title = f"Predicted beyond the target when held out: {len(missed)} of {len(checked)} configurations"
    return [Words(title, ("held out", "throughput", "p99"), rows)]


def _latency(latency: Latency) -> tuple[str, str, str]:
    return _ms(latency.p50), _ms(latency.p90), _ms(latency.p99)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
