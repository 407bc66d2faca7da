"""The published experiment, judged by `headrace compare`: what held, what did not, and what could never have been told.

    python benchmarks/judged.py RUNS --output RUNS/judged.md

RUNS is a folder of runs of the published designs. Every claim is tried by the verdict that `headrace compare RUNS:BASE
RUNS:CANDIDATE` gives to its quantity. Whether the published experiment could tell what it claimed is computed from its
own means and standard deviations of ten runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from headrace.files import write_whole
from headrace.study.compare import ComparedRow, Comparison, Selection, compare, load_side
from headrace.study.findings import SIGNIFICANCE
from headrace.study.finished import CellKey
from headrace.study.power import POWER, smallest_ratio
from headrace.study.published import RUNS_PER_ROW, Claim, claims, find, load_published
from headrace.study.quantities import GPU_UTILIZATION
from headrace.study.verdict import signed_percent
from headrace.study.welch import Moments, p_value

HELD, NOT_HELD, UNTOLD = "held", "did not hold", "could not be told"
OUTCOMES = (HELD, NOT_HELD, UNTOLD)
DIFFERENT = ("faster", "slower", "higher", "lower")  # how a verdict begins that tells a difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One claim at one batch size, there and here."""

    claim: Claim
    batch_size: int
    base: Moments | None  # published
    candidate: Moments | None
    row: ComparedRow

    @property
    def outcome(self) -> str:
        interval = self.row.compared.interval
        if interval is None or not self.row.compared.verdict.startswith(DIFFERENT):
            return UNTOLD
        return HELD if (interval.low > 1) == self.claim.claims_higher else NOT_HELD

    @property
    def smallest(self) -> float | None:
        """The smallest ratio that the published runs could tell; with the base's spread where there is no other."""
        return smallest_ratio(self.base, self.candidate or self.base) if self.base else None

    @property
    def change(self) -> float | None:
        """The published ratio."""
        return self.candidate.mean / self.base.mean if self.base and self.candidate else None

    @property
    def p(self) -> float | None:
        return p_value(self.base, self.candidate) if self.base and self.candidate else None

    @property
    def there(self) -> str:
        """What the published numbers themselves say of the claim."""
        if self.change is None or self.smallest is None or self.p is None:
            return "no table published"
        if self.p < SIGNIFICANCE:
            return "supported" if (self.change > 1) == self.claim.claims_higher else "the opposite"
        return "not to be told" if abs(math.log(self.change)) < math.log(self.smallest) else "not beyond chance"


def judge_all(runs: Path) -> tuple[list[Trial], list[Comparison]]:
    """Compare every pair of designs that something was claimed of, and try each claim by it."""
    published, comparisons = load_published(), {}
    sides = {name: load_side(Selection(path=runs, experiment=name)) for claim in claims() for name in _pair(claim)}
    trials = []
    for claim in claims():
        pair = _pair(claim)
        if pair not in comparisons:
            comparisons[pair] = compare(*(sides[name] for name in pair))
        for size in claim.batch_sizes:
            ours = [find(published, name, size, compiled=claim.compile) for name in pair]
            base, candidate = (row.moments(claim.metric) if row else None for row in ours)
            row = _row(comparisons[pair], claim, size)
            trials.append(Trial(claim=claim, batch_size=size, base=base, candidate=candidate, row=row))
    return trials, list(comparisons.values())


def _pair(claim: Claim) -> tuple[str, str]:
    return claim.base, claim.candidate


def _row(comparison: Comparison, claim: Claim, batch_size: int) -> ComparedRow:
    key = CellKey(compile=claim.compile, batch_size=batch_size)
    cell = next(cell for cell in comparison.cells if cell.key == key)
    return next(row for row in cell.rows if row.compared.quantity.name == claim.metric.name)


def render(trials: Sequence[Trial], comparisons: Sequence[Comparison], command: str) -> str:
    """Return the page: counts, then where each claim held, then every trial."""
    few = min(len(side.values) for trial in trials for side in (trial.row.compared.base, trial.row.compared.candidate))
    parts = [
        "# The published experiment, judged",
        f"`{command}`. Machine: {comparisons[0].machine}.",
        _HOW.format(few=few, published=RUNS_PER_ROW, power=100 * POWER),
        "## Summary",
        _counts(trials),
        "## Where each claim held",
        _where(trials),
        *(_section(list(group)) for _, group in groupby(trials, key=_key)),
    ]
    return "\n\n".join(parts) + "\n"


_HOW = (
    "Here: the verdict of `headrace compare RUNS:BASE RUNS:CANDIDATE`, where RUNS is that folder, by {few} runs or more"
    " of each side. With fewer than 5 every verdict is a hint, and with fewer than 4 there is no A/A pair. A claim held"
    " where the verdict tells a difference in the claimed direction, did not hold where it tells one in the other, and"
    " else could not be told.\n\n"
    "There: the published means and standard deviations of {published} runs. A claim is *supported* where Welch's test"
    " tells the difference at 5 %. It is *not to be told* where it does not, and the change is also smaller than the"
    " smallest that {published} runs of such spread tell in {power:.0f} % of experiments: the experiment was too small"
    " for it, whatever is true. No table of `executor` was published; its smallest change is that of two sides with the"
    " baseline's spread. More GPU utilization counts as better, as it did there. The published GPU was never recorded:"
    " only directions compare."
)


def _key(trial: Trial) -> tuple[str, str, str]:
    claim = trial.claim
    mode = "compiled" if claim.compile else "not compiled"
    return f"{claim.candidate} against {claim.base}", mode, claim.wording


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _counts(trials: Sequence[Trial]) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for (pair, mode), group in groupby(sorted(trials, key=_pair_order), key=lambda trial: _key(trial)[:2]):
            members = list(group)
            yield (pair, mode, *_numbers(members))
        yield ("all", "", *_numbers(trials))

    header = ("designs", "", "claims tried", *OUTCOMES, "supported by its own numbers", "not to be told by ten runs")
    return _table(header, rows())


def _pair_order(trial: Trial) -> tuple[int, bool]:
    pairs = list(dict.fromkeys(_pair(claim) for claim in claims()))
    return pairs.index(_pair(trial.claim)), trial.claim.compile


def _numbers(trials: Sequence[Trial]) -> list[str]:
    outcomes = [str(sum(trial.outcome == outcome for trial in trials)) for outcome in OUTCOMES]
    published = [trial.there for trial in trials if trial.change is not None]
    there = [str(published.count(words)) if published else "-" for words in ("supported", "not to be told")]
    return [str(len(trials)), *outcomes, *there]


def _where(trials: Sequence[Trial]) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for (pair, mode, wording), group in groupby(trials, key=_key):
            members = list(group)
            here = (_sizes(trial for trial in members if trial.outcome == outcome) for outcome in OUTCOMES)
            yield (f"{wording} ({pair}, {mode})", *here, _sizes(t for t in members if t.there == "not to be told"))

    return _table(("claim", *OUTCOMES, "not to be told by ten runs"), rows())


def _sizes(trials: Iterator[Trial]) -> str:
    """Return `throughput 1, 32; warm-up latency 64`: the batch sizes of each quantity."""
    groups = groupby(trials, key=lambda trial: trial.claim.metric.name)
    return "; ".join(f"{name} {', '.join(str(trial.batch_size) for trial in group)}" for name, group in groups)


def _section(trials: Sequence[Trial]) -> str:
    pair, mode, wording = _key(trials[0])
    header = ("quantity", "batch size", "published", "p", "smallest told by ten", "there", "here", "verdict", "")
    return f"## {pair}, {mode}: {wording}\n\n" + _table(header, map(_line, trials))


def _line(trial: Trial) -> Sequence[str]:
    low = (
        "" if trial.smallest is None else f"{signed_percent(1 / trial.smallest)} or {signed_percent(trial.smallest)} %"
    )
    return (
        trial.claim.metric.name + (" (%)" if trial.claim.metric is GPU_UTILIZATION else ""),
        str(trial.batch_size),
        "" if trial.change is None else f"{signed_percent(trial.change)} %",
        "" if trial.p is None else f"{trial.p:.3f}" if trial.p >= 0.001 else "< 0.001",
        low,
        trial.there,
        str(trial.row.compared.interval) if trial.row.compared.interval else "",
        trial.row.compared.verdict.removesuffix("; few runs: treat as a hint"),
        trial.outcome,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    command = f"python benchmarks/judged.py {args.runs} --output {args.output}"
    write_whole(args.output, render(*judge_all(args.runs), command))


if __name__ == "__main__":
    main()
