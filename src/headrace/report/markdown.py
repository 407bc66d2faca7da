"""A report as Markdown: the tables, without the plots."""

from __future__ import annotations

import json

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
from headrace.study.tables import row


def render(report: Report) -> str:
    """Return the page."""
    parts = [f"# Report: {report.title}"]
    parts += ["\n".join(f"- `{each.name}` cannot be read: {each.reason}" for each in report.unreadable)]
    for section in report.sections:
        parts += _section(section)
    parts += ["## How to read it", METHOD, SOURCES]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    facts = Table(("Fact", "Value"), tuple(environment_rows(section)))
    said = verdicts(section)
    bad = [f"- `{verdict.name}`: {'; '.join(verdict.lines)}" for verdict in said if not verdict.counts]
    remarks = [f"- {line} ({len(names)} of {len(section.machine.runs)} runs)" for line, names in shared_remarks(said)]
    shown = [f"- {name}: `{command}`" for name, command in commands(section)]
    parts = [f"## {section.machine.name}", best_sentence(section.cells), table(headline(section.cells))]
    parts += ["### Validity", "\n".join(bad) or "Every run counts.", "\n".join(remarks)]
    parts += ["### Environment", table(facts)]
    for each in calibrations(section):
        parts += ["### Calibration", f"```json\n{json.dumps(each, indent=2)}\n```"]
    return [*parts, "### Commands", "\n".join(shown)]


def table(shown: Table) -> str:
    lines = [row(shown.headings), row("---" if text else "---:" for text in shown.is_text)]
    return "\n".join([*lines, *(row(each) for each in shown.rows)])
