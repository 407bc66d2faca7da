"""Compares finished runs: per cell and quantity a ratio with its interval, and a verdict in honest words.

The unit is a run, which is a fresh process: latencies within a run follow from each other and carry no information
about how the next process will do. Every comparison carries its own control: the base against itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.bench.environment import differences as environment_differences
from headrace.bench.summary import RunSummary
from headrace.config import PUBLISHED_DESIGNS
from headrace.errors import IncomparableRuns, InvalidOption
from headrace.study.finished import (
    CellKey,
    Differences,
    changed_options,
    counts,
    experiment_rank,
    experiments,
    find_runs,
    has_wrong_answers,
    machine,
    revisions,
    several_targets,
    unlike,
)
from headrace.study.intervals import Runs, own_variance, percentile_interval
from headrace.study.quantities import AVERAGE, COMPARED, WARMUP, Quantity
from headrace.study.samples import MeasuredRun, Sample, pooled_percentile, read_run
from headrace.study.verdict import THRESHOLD, Compared, typical, verdict

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
    runs: tuple[MeasuredRun, ...]

    @property
    def summaries(self) -> list[RunSummary]:
        return [run.summary for run in self.runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """A quantity's verdict, and what each side shows of it: a percentile is one of all requests of its runs."""

    compared: Compared
    base: float
    candidate: float
    pooled: bool = False  # of a percentile: of all requests; else the median of the runs', which kept no requests


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedCell:
    """One batch size and compile mode; `experiment` is set where both sides hold several, matched by it."""

    key: CellKey
    experiment: str | None
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the page says."""

    base: str
    candidate: str
    machine: str
    base_revisions: tuple[str, ...]
    candidate_revisions: tuple[str, ...]
    changed: tuple[str, ...]  # options that the sides do not have alike
    threshold: float
    warnings: tuple[str, ...]
    cells: tuple[ComparedCell, ...]

    @property
    def intervals(self) -> int:
        """How many chances there were to find a difference by accident."""
        return sum(row.compared.ratio is not None for cell in self.cells for row in cell.rows)


@dataclass(frozen=True, slots=True, order=True)
class _Match:
    key: CellKey
    rank: tuple[int, int, str]  # of the experiment, empty name where it is not part of the match


def parse_selection(text: str) -> Selection:
    """Read `PATH` or `PATH:EXPERIMENT`. A folder whose own name holds a colon is found as it is.

    Runs against a server have its label as their experiment. Raises InvalidOption where neither folder exists and what
    follows the colon is no design's experiment.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Selection(path=Path(text))
    if _EXPERIMENT.fullmatch(tail) or Path(head).exists():
        return Selection(path=Path(head), experiment=tail)
    raise InvalidOption(
        f"{text}: {tail!r} is no experiment; after the colon stands one of"
        f" {', '.join(PUBLISHED_DESIGNS)}, N_predict_workers or N_lanes, with -ring or -ring-zero-copy behind it for"
        " runs over the ring"
    )


def load_side(selection: Selection) -> Side:
    """Read the selected runs. Raises OutputError where the folder has no runs, InvalidOption for no such."""
    found = find_runs(selection.path)
    chosen = [run for run in found if selection.experiment in (None, run.summary.experiment)]
    if not chosen:
        raise InvalidOption(
            f"{selection}: {selection.path} holds no run of {selection.experiment}; it has"
            f" {', '.join(experiments(run.summary for run in found))}"
        )
    return Side(label=str(selection), runs=tuple(read_run(run) for run in chosen))


def compare(
    base: Side,
    candidate: Side,
    *,
    threshold: float = THRESHOLD,
    bound_s: float | None = None,
    allow_unlike: bool = False,
    differences: Differences = environment_differences,
) -> Comparison:
    """Compare every cell that both sides have; goodput too, within `bound_s` or the runs' own bound.

    Raises IncomparableRuns where they have none in common, where it is not clear what to compare with what, where a
    side's runs were made against several servers, and, unless `allow_unlike`, where more differs than the design, the
    number of workers and the code's revision, or, of runs against a server, than the server.
    """
    runs = (*base.summaries, *candidate.summaries)
    for side in (base, candidate):
        if several := several_targets(side.summaries):
            raise IncomparableRuns(
                f"{side.label}: {'; '.join(several)}; runs of one side are repeats against one server: keep them in"
                " separate folders, or measure with --label NAME and compare PATH:NAME"
            )
    different = unlike(runs, differences)
    if different and not allow_unlike:
        raise IncomparableRuns(
            f"{base.label} and {candidate.label} differ in more than the design or server: {'; '.join(different)};"
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
    bound_s = runs[0].options.load.bound_s if bound_s is None else bound_s
    return Comparison(
        base=base.label,
        candidate=candidate.label,
        machine=machine(runs),
        base_revisions=tuple(revisions(base.summaries)),
        candidate_revisions=tuple(revisions(candidate.summaries)),
        changed=changed_options(base.summaries, candidate.summaries),
        threshold=threshold,
        warnings=(
            *(f"UNLIKE RUNS, so a difference may have this cause: {line}" for line in different),
            *_remarks(base),
            *_remarks(candidate),
            *(f"only on one side, so not compared: {_name(match, by_experiment)}" for match in alone),
        ),
        cells=tuple(
            ComparedCell(
                key=match.key,
                experiment=match.rank[2] if by_experiment else None,
                rows=tuple(_rows(ours[match], theirs[match], threshold, bound_s)),
                notes=(*_alone(base.label, ours[match]), *_alone(candidate.label, theirs[match])),
            )
            for match in common
        ),
    )


def _by_experiment(base: Side, candidate: Side) -> bool:
    """Return whether runs are matched by experiment: if both sides hold several, and not if both hold one."""
    ours, theirs = experiments(base.summaries), experiments(candidate.summaries)
    if len(ours) == 1 and len(theirs) == 1:
        return False
    for side, names in ((base, ours), (candidate, theirs)):
        if len(names) == 1:
            raise IncomparableRuns(
                f"{side.label} holds one experiment ({names[0]}) and the other side several; name one of them"
                " there, as PATH:EXPERIMENT"
            )
    return True


def _group(side: Side, *, by_experiment: bool) -> dict[_Match, list[MeasuredRun]]:
    groups: dict[_Match, list[MeasuredRun]] = {}
    for run in side.runs:
        if counts(run.summary):
            rank = experiment_rank(run.summary.experiment if by_experiment else "")
            groups.setdefault(_Match(CellKey.of(run.summary), rank), []).append(run)
    return groups


Read = Callable[[MeasuredRun], float | None]


def _rows(
    base: Sequence[MeasuredRun], candidate: Sequence[MeasuredRun], threshold: float, bound_s: float | None
) -> Iterator[ComparedRow]:
    by_url = any(run.summary.options.target for run in (*base, *candidate))
    for quantity, read in _quantities(bound_s):
        if by_url and quantity is WARMUP:  # the server had been started before, and by others
            continue
        ours, theirs = _values(quantity, read, base), _values(quantity, read, candidate)
        if ours.values and theirs.values:
            compared = verdict(quantity, ours, theirs, threshold)
            yield _row(quantity, compared, *(_samples(_with_latency(runs)) for runs in (base, candidate)))


def _quantities(bound_s: float | None) -> Iterator[tuple[Quantity, Read]]:
    for quantity in COMPARED:
        yield quantity, lambda run, quantity=quantity: quantity.read(run.summary)  # type: ignore[misc]
    if bound_s is not None:
        name = f"goodput within {bound_s:g} s"
        goodput = Quantity(name=name, unit="samples/s", read=lambda _: None, higher_is_better=True)
        yield goodput, lambda run: run.sample.goodput(bound_s) if run.sample else None


def _row(
    quantity: Quantity, compared: Compared, base: Sequence[Sample] | None, candidate: Sequence[Sample] | None
) -> ComparedRow:
    if quantity.percentile is None or base is None or candidate is None:
        ours, theirs = typical(quantity, compared.base.values), typical(quantity, compared.candidate.values)
        return ComparedRow(compared=compared, base=ours, candidate=theirs)
    ours, theirs = (pooled_percentile(side, quantity.percentile) for side in (base, candidate))
    return ComparedRow(compared=compared, base=ours, candidate=theirs, pooled=True)


def _values(quantity: Quantity, read: Read, runs: Sequence[MeasuredRun]) -> Runs:
    pairs = [(value, run.repeat) for run in runs if (value := read(run)) is not None]
    return Runs(
        values=tuple(value for value, _ in pairs),
        repeats=tuple(repeat for _, repeat in pairs),
        own_variance=_own_variance(quantity, runs),
    )


def _own_variance(quantity: Quantity, runs: Sequence[MeasuredRun]) -> float | None:
    """Return the runs' mean own variance, of steady runs' response times; what else there is has none."""
    samples = _samples(runs)
    if samples is None or not (quantity.is_percentile or quantity is AVERAGE):
        return None
    if not all(sample.steadiness.steady and sample.response_s.min() > 0 for sample in samples):
        return None
    return sum(own_variance(sample.response_s, quantity.percentile) for sample in samples) / len(samples)


def _samples(runs: Sequence[MeasuredRun]) -> list[Sample] | None:
    """Return all of the runs' requests, or None where a run has none."""
    samples = [run.sample for run in runs if run.sample is not None]
    return samples if len(samples) == len(runs) else None


def _with_latency(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    return [run for run in runs if not run.overloaded]


def _alone(label: str, runs: Sequence[MeasuredRun]) -> list[str]:
    """Return what can be said of a side's p99 where it has one run, of a steady load."""
    sample = runs[0].sample
    if len(runs) > 1 or sample is None or not sample.steadiness.steady:
        return []
    try:
        p99 = percentile_interval(sample.response_s, 99)
    except InvalidOption as too_short:
        return [f"{label}, its one process alone: {too_short}"]
    return [
        f"{label}: the p99 of its one process lies at {p99.low:.3g} to {p99.high:.3g} s (95 %); another process may"
        " differ"
    ]


def _remarks(side: Side) -> list[str]:
    """Return what must be said of a side's runs: those not averaged in, not steady, or known by their summary only."""
    bad = [run for run in side.summaries if not counts(run)]
    wrong = sum(has_wrong_answers(run) for run in bad)
    unsteady = [run.sample for run in side.runs if run.sample and run.sample.steadiness.steady is False]
    overloaded = sum(run.overloaded for run in side.runs)
    without = sum(not run.has_records for run in side.runs)
    said = (
        (len(bad) - wrong, "failed; not averaged in"),
        (wrong, "had wrong answers; not averaged in"),
        (len(unsteady), f"not steady, as one: {unsteady[0].steadiness.reason}" if unsteady else ""),
        (overloaded, "were sent more than was answered; no latency of theirs exists, and none is compared"),
        (without, "kept no requests; their values are those of their summaries, and no percentile is of all requests"),
    )
    return [f"{side.label}: {number} of {len(side.runs)} runs {what}" for number, what in said if number]


def _name_all(matches: Iterable[_Match], by_experiment: bool) -> str:
    return "; ".join(_name(match, by_experiment) for match in sorted(matches)) or "no run that counts"


def _name(match: _Match, by_experiment: bool) -> str:
    compiled = "compile" if match.key.compile else "no compile"
    name = f"batch size {match.key.batch_size}, {compiled}"
    return f"{match.rank[2]}, {name}" if by_experiment else name
