"""A report as one HTML file: no script, nothing from elsewhere, light and dark, phone, desk and paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from headrace.report.figures import Figure, comparisons
from headrace.report.measured import CellNumbers
from headrace.report.model import (
    METHOD,
    SOURCES,
    Report,
    Section,
    Table,
    best_sentence,
    calibrations,
    commands,
    environment_rows,
    headline,
    shared_remarks,
    verdicts,
)
from headrace.report.run_figures import run_figures
from headrace.report.words import count, duration

OPEN_CELLS = 3  # with so few, their figures are shown without being asked for


def render(report: Report) -> str:
    """Return the page."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    sections = "".join(_section(section, at) for at, section in enumerate(report.sections))
    good = sum(run.counts for run in report.runs)
    many = len(report.runs)
    counted = f"{count(many, 'run')}, " + (
        f"of which {good:,} count" if good < many else "all of which count" if many > 1 else "which counts"
    )
    bound = f", latency bound {duration(report.bound_s)}" if report.bound_s is not None else ""
    title = escape(f"Headrace report: {report.title}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"<header><h1>{title}</h1><p>{escape(counted + bound)}.</p>{_contents(report)}{_unreadable(report)}</header>\n"
        f"<main>\n{sections}"
        f'<section id="method"><h2>How to read it</h2><p>{escape(METHOD)}</p><p>{escape(SOURCES)}</p></section>\n'
        "</main>\n</body>\n</html>\n"
    )


def _contents(report: Report) -> str:
    if len(report.sections) == 1:
        return ""
    links = "".join(
        f'<li><a href="#machine-{at}">{escape(section.machine.name)}</a></li>'
        for at, section in enumerate(report.sections)
    )
    return f"<p>The runs are of unlike machines, which are not compared:</p><ul>{links}</ul>"


def _unreadable(report: Report) -> str:
    if not report.unreadable:
        return ""
    lines = "".join(f"<li><b>{escape(each.name)}</b>: {escape(each.reason)}</li>" for each in report.unreadable)
    return f'<div class="warning"><p>In no table and no plot, since they cannot be read:</p><ul>{lines}</ul></div>'


def _section(section: Section, at: int) -> str:
    figures = "".join(map(_figure, comparisons(section.cells)))
    left = [cell for cell in section.cells if cell.detail]
    cells = "".join(_cell(cell, is_open=len(left) <= OPEN_CELLS) for cell in left)
    return (
        f'<section id="machine-{at}"><h2>{escape(section.machine.name)}</h2>'
        f'<p class="finding">{escape(best_sentence(section.cells))}</p>'
        f"{_table(headline(section.cells), 'headline')}"
        f'<div class="figures">{figures}</div>'
        f"<h3>Each cell over time</h3><p>Of each cell the run with the longest response time.</p>{cells}"
        f"<h3>Validity</h3>{_validity(section)}"
        f"<h3>Environment</h3>{_facts(environment_rows(section))}"
        f"{_calibration(section)}"
        f"<h3>Commands</h3>{_commands(section)}</section>\n"
    )


def _table(table: Table, style: str) -> str:
    def cell(tag: str, text: str, at: int) -> str:
        return f"<{tag}{' class=word' if table.is_text[at] else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, at) for at, text in enumerate(table.headings))

    def first(text: str) -> str:
        name, _, rest = text.partition(" · ")  # what is unusual goes below the experiment
        return f"<th class=word>{escape(name)}{f'<small>{escape(rest)}</small>' if rest else ''}</th>"

    rows = "".join(
        "<tr>" + first(row[0]) + "".join(cell("td", text, at + 1) for at, text in enumerate(row[1:])) + "</tr>"
        for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{style}">{body}</table></div>'


def _figure(figure: Figure) -> str:
    key = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for style, name in figure.key)
    return (
        f"<figure><h4>{escape(figure.title)}</h4>{f'<ul class=key>{key}</ul>' if key else ''}{figure.svg}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _cell(numbers: CellNumbers, *, is_open: bool) -> str:
    cell, detail = numbers.cell, numbers.detail
    name = f"{cell.label}, batch size {cell.batch_size}, {cell.load_words}"
    run = f"Run {detail.run_name}." if detail else ""
    warm = numbers.warmup_run
    parts = ", ".join(f"{part} {duration(took)}" for part, took in (warm.warmup_parts_s if warm else {}).items())
    warm_up = f" Warm-up latency {duration(numbers.warmup_s)}: {parts}." if parts else ""
    batches = [f" All batches had {size} rows." for size in numbers.batches if len(numbers.batches) == 1]
    facts = escape(run + warm_up + "".join(batches))
    figures = "".join(map(_figure, run_figures(numbers)))
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(name)}</summary><p>{facts}</p>"
        f'<div class="figures">{figures}</div></details>'
    )


def _validity(section: Section) -> str:
    said = verdicts(section)
    bad = [verdict for verdict in said if not verdict.counts]
    rows = "".join(f"<li><b>{escape(each.name)}</b>: {escape('; '.join(each.lines))}</li>" for each in bad)
    first = f'<p>These do not count:</p><ul class="bad">{rows}</ul>' if bad else "<p>Every run counts.</p>"
    many = len(section.machine.runs)
    notes = "".join(
        f"<li>{escape(line)} <small>({_who(names, many)})</small></li>" for line, names in shared_remarks(said)
    )
    return first + (f"<p>What must be known of those that count:</p><ul>{notes}</ul>" if notes else "")


def _who(names: Sequence[str], many: int) -> str:
    if len(names) == many:
        return "every run" if many > 1 else "the run"
    return escape(", ".join(names)) if len(names) <= 3 else f"{len(names)} of {many} runs, first {escape(names[0])}"


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"


def _calibration(section: Section) -> str:
    found = "".join(f"<pre>{escape(json.dumps(each, indent=2))}</pre>" for each in calibrations(section))
    return f"<h3>Calibration of the harness</h3>{found}" if found else ""


def _commands(section: Section) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>" for name, text in commands(section))
    heading = f"{count(len(section.cells), 'command')}, one for each cell"
    return f"<details><summary>{heading}</summary><dl>{lines}</dl></details>"
