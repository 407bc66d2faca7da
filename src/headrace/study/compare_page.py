"""A comparison in Markdown: as a page, and as an entry of a changelog."""

from __future__ import annotations

from headrace.study.compare import ComparedCell, ComparedRow, Comparison
from headrace.study.verdict import LEAST_FOR_HALVES, percent

PERCENTILES = "linear interpolation between order statistics (Hyndman and Fan's type 7)"


def render_markdown(comparison: Comparison) -> str:
    """Return the comparison as a page."""
    parts = [
        f"# {comparison.candidate} compared with {comparison.base}",
        f"Base: `{comparison.base}`. Candidate: `{comparison.candidate}`. Machine: {comparison.machine}.",
        *(f"**{warning}**" for warning in comparison.warnings),
        *(_render_cell(cell) for cell in comparison.cells),
        _closing(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def render_changelog(comparison: Comparison) -> str:
    """Return an entry in the form of Keep a Changelog 1.1: what changed, and what happened in every cell."""
    before, after = ", ".join(comparison.base_revisions), ", ".join(comparison.candidate_revisions)
    revision = f"headrace {after}" if before == after else f"headrace {before} -> {after}"
    changed = "; ".join(comparison.changed) or "no option differs"
    lines = [
        "### Changed",
        "",
        f"- `{comparison.candidate}` against `{comparison.base}`: {revision}; {changed}.",
        f"  Machine: {comparison.machine}.",
        *(f"  {warning}." for warning in comparison.warnings),
        *(f"  - {title(cell)}: {'; '.join(_entry(row) for row in cell.rows)}." for cell in comparison.cells),
    ]
    return "\n".join(lines) + "\n"


def title(cell: ComparedCell) -> str:
    mode = "compile" if cell.key.compile else "no compile"
    return f"{cell.experiment + ', ' if cell.experiment else ''}batch size {cell.key.batch_size}, {mode}"


def _entry(row: ComparedRow) -> str:
    compared = row.compared
    ratio = f", ratio {compared.ratio.interval}" if compared.ratio else ""
    values = f"{row.base:.3f} -> {row.candidate:.3f} {compared.quantity.unit}"
    return f"{compared.quantity.name} {values}{ratio}: {compared.verdict}"


def _render_cell(cell: ComparedCell) -> str:
    lines = [
        f"## {title(cell)}",
        "",
        "| Quantity | Runs | Base | Candidate | Ratio (95 %) | Base against itself | Verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_render_row(row) for row in cell.rows),
        *(line for note in cell.notes for line in ("", note)),
    ]
    return "\n".join(lines)


def _render_row(row: ComparedRow) -> str:
    compared, of = row.compared, ""
    if compared.quantity.is_percentile:
        of = ", of all requests" if row.pooled else ", median of runs"
    cells = (
        f"{compared.quantity.name} ({compared.quantity.unit}{of})",
        f"{len(compared.base.values)} and {len(compared.candidate.values)}",
        f"{row.base:.3f}",
        f"{row.candidate:.3f}",
        str(compared.ratio.interval) if compared.ratio else "",
        str(compared.itself.interval) if compared.itself else "",
        compared.verdict,
    )
    return "| " + " | ".join(cells) + " |"


def _closing(comparison: Comparison) -> str:
    return (
        f"{comparison.intervals} intervals were computed. At 95 %, about 1 in 20 comparisons of things that"
        " do not differ looks like a difference by chance, so a lone one among many is weak evidence. The"
        " ratio is candidate / base, of geometric means over runs of each run's own value, with Welch's interval on the"
        " logarithms; where both sides ran in the same blocks of a sweep and pairing the runs narrows the interval by"
        " 40 % or more, Student's of the pairs. A percentile is shown of all requests of all runs, by"
        f" {PERCENTILES}, so its ratio need not be the quotient of the two values shown. A base of"
        f" {LEAST_FOR_HALVES} runs or more is compared with itself, every other run against the rest; where that looks"
        " like a difference, the comparison is void. A latency that is faster is shorter by so many percent;"
        " utilization is higher or lower, and neither is better by itself. Two sides are the same within"
        f" {percent(comparison.threshold * 100)} % where the whole interval lies there."
    )
