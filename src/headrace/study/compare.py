"""Compares finished runs: per cell and quantity a ratio with its interval, and a verdict in honest words.

The unit is a run, which is a fresh process: latencies within a run follow from each other and carry no
information about how the next process will do. Blocks of a sweep are not used yet; pairing by block would
narrow the intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.bench.environment import differences as environment_differences
from headrace.bench.summary import RunSummary
from headrace.config import PUBLISHED_DESIGNS
from headrace.errors import IncomparableRuns, InvalidOption
from headrace.study.finished import (
    CellKey,
    Differences,
    counts,
    experiment_rank,
    experiments,
    has_wrong_answers,
    load_runs,
    machine,
    unlike,
)
from headrace.study.quantities import COMPARED
from headrace.study.verdict import THRESHOLD, Compared, percent, typical, verdict

_EXPERIMENT = re.compile(rf"({'|'.join(PUBLISHED_DESIGNS)}|\d+_predict_workers|\d+_lanes)(-ring(-zero-copy)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What `PATH[:EXPERIMENT]` names."""

    path: Path
    experiment: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.experiment}" if self.experiment else str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two things compared: its runs, failed ones included."""

    label: str
    runs: tuple[RunSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedCell:
    """One batch size and compile mode; `experiment` is set where both sides hold several, matched by it."""

    key: CellKey
    experiment: str | None
    rows: tuple[Compared, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the page says."""

    base: str
    candidate: str
    machine: str
    threshold: float
    warnings: tuple[str, ...]
    cells: tuple[ComparedCell, ...]

    @property
    def intervals(self) -> int:
        """How many chances there were to find a difference by accident."""
        return sum(row.interval is not None for cell in self.cells for row in cell.rows)


@dataclass(frozen=True, slots=True, order=True)
class _Match:
    key: CellKey
    rank: tuple[int, int, str]  # of the experiment, empty name where it is not part of the match


def parse_selection(text: str) -> Selection:
    """Read `PATH` or `PATH:EXPERIMENT`. A folder whose own name holds a colon is found as it is.

    Raises InvalidOption where what follows the colon is no experiment and no such folder exists.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Selection(path=Path(text))
    if _EXPERIMENT.fullmatch(tail):
        return Selection(path=Path(head), experiment=tail)
    raise InvalidOption(
        f"{text}: {tail!r} is no experiment; after the colon stands one of"
        f" {', '.join(PUBLISHED_DESIGNS)}, N_predict_workers or N_lanes, with -ring or -ring-zero-copy behind it for"
        " runs over the ring"
    )


def load_side(selection: Selection) -> Side:
    """Read the selected runs. Raises OutputError where the folder has no runs, InvalidOption for no such."""
    runs = load_runs(selection.path)
    chosen = [run for run in runs if selection.experiment in (None, run.experiment)]
    if not chosen:
        raise InvalidOption(
            f"{selection}: {selection.path} holds no run of {selection.experiment}; it has"
            f" {', '.join(experiments(runs))}"
        )
    return Side(label=str(selection), runs=tuple(chosen))


def compare(
    base: Side,
    candidate: Side,
    *,
    threshold: float = THRESHOLD,
    allow_unlike: bool = False,
    differences: Differences = environment_differences,
) -> Comparison:
    """Compare every cell that both sides have.

    Raises IncomparableRuns where they have none in common, where it is not clear what to compare with what,
    and, unless `allow_unlike`, where more differs than the design, the number of workers and the code's
    revision.
    """
    runs = (*base.runs, *candidate.runs)
    different = unlike(runs, differences)
    if different and not allow_unlike:
        raise IncomparableRuns(
            f"{base.label} and {candidate.label} differ in more than the design: {'; '.join(different)};"
            " measure them alike, or add --allow-unlike to compare all the same"
        )
    by_experiment = _by_experiment(base, candidate)
    ours, theirs = _group(base, by_experiment=by_experiment), _group(candidate, by_experiment=by_experiment)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise IncomparableRuns(
            f"no cell in common: {base.label} has {_name_all(ours, by_experiment)}, {candidate.label} has"
            f" {_name_all(theirs, by_experiment)}; measure the same batch sizes and compile modes on both"
            " sides"
        )
    alone = sorted(ours.keys() ^ theirs.keys())
    return Comparison(
        base=base.label,
        candidate=candidate.label,
        machine=machine(runs),
        threshold=threshold,
        warnings=(
            *(f"UNLIKE RUNS, so a difference may have this cause: {line}" for line in different),
            *_uncounted(base),
            *_uncounted(candidate),
            *(f"only on one side, so not compared: {_name(match, by_experiment)}" for match in alone),
        ),
        cells=tuple(
            ComparedCell(
                key=match.key,
                experiment=match.rank[2] if by_experiment else None,
                rows=tuple(_rows(ours[match], theirs[match], threshold)),
            )
            for match in common
        ),
    )


def render_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown page."""
    parts = [
        f"# {comparison.candidate} compared with {comparison.base}",
        f"Base: `{comparison.base}`. Candidate: `{comparison.candidate}`. Machine: {comparison.machine}.",
        *(f"**{warning}**" for warning in comparison.warnings),
        *(_render_cell(cell) for cell in comparison.cells),
        _closing(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _by_experiment(base: Side, candidate: Side) -> bool:
    """Return whether runs are matched by experiment: if both sides hold several, and not if both hold one."""
    ours, theirs = experiments(base.runs), experiments(candidate.runs)
    if len(ours) == 1 and len(theirs) == 1:
        return False
    for side, names in ((base, ours), (candidate, theirs)):
        if len(names) == 1:
            raise IncomparableRuns(
                f"{side.label} holds one experiment ({names[0]}) and the other side several; name one of them"
                " there, as PATH:EXPERIMENT"
            )
    return True


def _group(side: Side, *, by_experiment: bool) -> dict[_Match, list[RunSummary]]:
    groups: dict[_Match, list[RunSummary]] = {}
    for run in filter(counts, side.runs):
        match = _Match(CellKey.of(run), experiment_rank(run.experiment if by_experiment else ""))
        groups.setdefault(match, []).append(run)
    return groups


def _rows(base: Sequence[RunSummary], candidate: Sequence[RunSummary], threshold: float) -> Iterator[Compared]:
    for quantity in COMPARED:
        ours, theirs = quantity.values(base), quantity.values(candidate)
        if ours and theirs:
            yield verdict(quantity, ours, theirs, threshold)


def _uncounted(side: Side) -> list[str]:
    """Return what must be said of runs that are not averaged in."""
    bad = [run for run in side.runs if not counts(run)]
    wrong = sum(has_wrong_answers(run) for run in bad)
    said = ((len(bad) - wrong, "failed"), (wrong, "had wrong answers"))
    return [
        f"{side.label}: {number} of {len(side.runs)} runs {what}; not averaged in" for number, what in said if number
    ]


def _name_all(matches: Iterable[_Match], by_experiment: bool) -> str:
    return "; ".join(_name(match, by_experiment) for match in sorted(matches)) or "no run that counts"


def _name(match: _Match, by_experiment: bool) -> str:
    compiled = "compile" if match.key.compile else "no compile"
    name = f"batch size {match.key.batch_size}, {compiled}"
    return f"{match.rank[2]}, {name}" if by_experiment else name


def _render_cell(cell: ComparedCell) -> str:
    mode = "compile" if cell.key.compile else "no compile"
    title = f"## {cell.experiment + ', ' if cell.experiment else ''}batch size {cell.key.batch_size}, {mode}"
    lines = [
        title,
        "",
        "| Quantity | Runs | Base | Candidate | Ratio (95 %) | Verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_render_row(row) for row in cell.rows),
    ]
    return "\n".join(lines)


def _render_row(row: Compared) -> str:
    quantity, interval = row.quantity, row.interval
    of = ", median of runs" if quantity.is_percentile else ""
    cells = (
        f"{quantity.name} ({quantity.unit}{of})",
        f"{len(row.base)} and {len(row.candidate)}",
        f"{typical(quantity, row.base):.3f}",
        f"{typical(quantity, row.candidate):.3f}",
        str(interval) if interval else "",
        row.verdict,
    )
    return "| " + " | ".join(cells) + " |"


def _closing(comparison: Comparison) -> str:
    return (
        f"{comparison.intervals} intervals were computed. At 95 %, about 1 in 20 comparisons of things that"
        " do not differ looks like a difference by chance, so a lone one among many is weak evidence. The"
        " ratio is candidate / base, of geometric means over runs, with Welch's interval on the logarithms. A"
        " latency that is faster is shorter by so many percent; utilization is higher or lower, and neither"
        " is better by itself. A difference is called one that does not matter where the whole interval lies"
        f" within {percent(comparison.threshold * 100)} %. Runs were compared as independent; that repeats of"
        " a sweep are blocks is not used."
    )
