"""The published claims, tried again: what held on this machine, what did not, and what could not be told.

Only directions and ratios are judged. The published GPU was never recorded, so that absolute values stand
beside each other here without a comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Literal, TypeAlias

from headrace.bench.environment import differences as environment_differences
from headrace.bench.summary import RunSummary
from headrace.errors import IncomparableRuns
from headrace.study.finished import Differences, counts, has_wrong_answers, machine, unlike
from headrace.study.published import Claim, PublishedRow, claims, find, load_published
from headrace.study.verdict import FEW_RUNS, interval_of
from headrace.study.welch import Moments, RatioInterval, p_value

Verdict: TypeAlias = Literal["held", "did not hold", "could not be told"]
VERDICTS: tuple[Verdict, ...] = ("held", "did not hold", "could not be told")
SIGNIFICANCE = 0.05

_HOW = (
    "A claim held at a batch size where the 95 % interval of the ratio (candidate / base, Welch's on the"
    " logarithms of the runs' values) lies wholly on the claimed side of 1; it did not hold where the"
    " interval lies wholly on the other side; everything else could not be told. Whether the published"
    " numbers support their own claim is Welch's test on their means and standard deviations of 10 runs. More"
    " GPU utilization counts as better, as it did there; it is the share of time with any kernel running. The"
    " published GPU was never recorded, so absolute values cannot be compared between there and here;"
    " directions and ratios can."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim at one batch size."""

    claim: Claim
    batch_size: int
    published_base: Moments | None
    published_candidate: Moments | None
    base: tuple[float, ...]  # of the runs that count
    candidate: tuple[float, ...]
    interval: RatioInterval | None
    verdict: Verdict

    @property
    def support(self) -> str:
        """Whether the published numbers themselves support the claim."""
        if self.published_base is None or self.published_candidate is None:
            return "no table published"
        p = p_value(self.published_base, self.published_candidate)
        shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        if p >= SIGNIFICANCE:
            return f"not beyond chance ({shown})"
        higher = self.published_candidate.mean > self.published_base.mean
        return f"yes ({shown})" if higher == self.claim.claims_higher else f"no, the opposite ({shown})"


def judge_all(runs: Sequence[RunSummary]) -> list[Finding]:
    """Try every claim at every batch size that it names."""
    published = load_published()
    good = [run for run in runs if counts(run)]
    return [judge(claim, size, good, published) for claim in claims() for size in claim.batch_sizes]


def judge(claim: Claim, batch_size: int, runs: Sequence[RunSummary], published: Sequence[PublishedRow]) -> Finding:
    """Try one claim at one batch size, by runs that count."""
    published_base, published_candidate = (
        find(published, name, batch_size, compiled=claim.compile) for name in (claim.base, claim.candidate)
    )
    base, candidate = (
        claim.metric.values(_select(runs, name, batch_size, compiled=claim.compile))
        for name in (claim.base, claim.candidate)
    )
    interval = interval_of(claim.metric, base, candidate) if base and candidate else None
    return Finding(
        claim=claim,
        batch_size=batch_size,
        published_base=published_base.moments(claim.metric) if published_base else None,
        published_candidate=published_candidate.moments(claim.metric) if published_candidate else None,
        base=base,
        candidate=candidate,
        interval=interval,
        verdict=_verdict(claim, interval),
    )


def render_findings(runs: Sequence[RunSummary], differences: Differences = environment_differences) -> str:
    """Return the page, computed from the runs and the published tables alone. Callers give at least 1 run.

    Raises IncomparableRuns where the runs' environments or options are unlike.
    """
    if different := unlike(runs, differences):
        raise IncomparableRuns(
            "these runs cannot be judged together, since more differs than the design:"
            f" {'; '.join(different)}; give the runs of one sweep"
        )
    findings = judge_all(runs)
    parts = [
        "# The published findings, tried again",
        f"Machine: {machine(runs)}.",
        f"Runs: {_run_counts(runs)}.",
        *_conditions(runs[0]),
        _HOW,
        "## Summary",
        _summary(findings),
        _chance(findings),
        *(_section(list(group)) for _, group in groupby(findings, key=_group_key)),
    ]
    return "\n\n".join(parts) + "\n"


def _select(runs: Iterable[RunSummary], experiment: str, batch_size: int, *, compiled: bool) -> list[RunSummary]:
    wanted = (experiment, batch_size, compiled)
    return [run for run in runs if (run.experiment, run.options.inputs.batch_size, run.options.model.compile) == wanted]


def _verdict(claim: Claim, interval: RatioInterval | None) -> Verdict:
    if interval is None or interval.low <= 1 <= interval.high:
        return "could not be told"
    return "held" if (interval.low > 1) == claim.claims_higher else "did not hold"


def _group_key(finding: Finding) -> tuple[str, str]:
    """Tell findings apart that stand under one heading: those of one sentence about one pair."""
    claim = finding.claim
    mode = "compile" if claim.compile else "no compile"
    return claim.step, f"{claim.wording} ({claim.candidate} vs {claim.base}, {mode})"


def _run_counts(runs: Sequence[RunSummary]) -> str:
    good = sum(counts(run) for run in runs)
    wrong = sum(has_wrong_answers(run) for run in runs)
    return f"{good} count, {len(runs) - good - wrong} failed, {wrong} had wrong answers"


def _conditions(run: RunSummary) -> list[str]:
    """Return what was measured otherwise than published, if anything."""
    options = run.options
    pairs = (
        ("model", options.model.name, "resnet18"),
        ("requests", str(options.load.num_iters), "100"),
        ("image size", str(options.inputs.image_size), "250"),
        ("input", "files" if options.inputs.files else options.inputs.kind, "random"),
        ("device", options.device_kind, "cuda"),
    )
    different = [f"{name} {here} (published: {there})" for name, here, there in pairs if here != there]
    return [f"Other than published: {', '.join(different)}."] if different else []


def _summary(findings: Sequence[Finding]) -> str:
    lines = [
        "| Step | Claim | Held at | Did not hold at | Could not be told at |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (step, claim), group in groupby(findings, key=_group_key):
        members = list(group)
        where = (_where([member for member in members if member.verdict == verdict]) for verdict in VERDICTS)
        lines.append(f"| {' | '.join([step, claim, *where])} |")
    return "\n".join(lines)


def _where(findings: Sequence[Finding]) -> str:
    """Return `throughput 1, 32; average latency 64`: the batch sizes of each quantity."""
    return "; ".join(
        f"{name} {', '.join(str(finding.batch_size) for finding in group)}"
        for name, group in groupby(findings, key=lambda finding: finding.claim.metric.name)
    )


def _chance(findings: Sequence[Finding]) -> str:
    judged = [finding for finding in findings if finding.interval is not None]
    totals = ", ".join(f"{sum(item.verdict == verdict for item in findings)} {verdict}" for verdict in VERDICTS)
    return (
        f"Of {len(findings)} trials: {totals}. {len(judged)} had enough runs for an interval; at 95 %, about"
        " 1 in 20 comparisons of things that do not differ looks like a difference by chance. Trials share"
        " runs, so their verdicts are not independent."
    )


def _section(findings: Sequence[Finding]) -> str:
    step, claim = _group_key(findings[0])
    lines = [
        f"## {step}: {claim}",
        "",
        "| Quantity | Batch size | Published | Supported by its own numbers | Here (mean) | Runs | Ratio (95"
        " %) | Verdict |",
        f"|{' --- |' * 8}",
        *(_row(finding) for finding in findings),
        *_sizes(findings),
    ]
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    interval = finding.interval
    cells = (
        f"{finding.claim.metric.name} ({finding.claim.metric.unit})",
        str(finding.batch_size),
        _published(finding),
        finding.support,
        f"{_mean(finding.base)} -> {_mean(finding.candidate)}",
        f"{len(finding.base)} and {len(finding.candidate)}",
        str(interval) if interval else "",
        finding.verdict + _reason(finding),
    )
    return f"| {' | '.join(cells)} |"


def _published(finding: Finding) -> str:
    sides = (finding.published_base, finding.published_candidate)
    return " -> ".join(f"{side.mean:.3f} +/- {side.std:.3f}" if side else "none" for side in sides)


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else "not measured"


def _reason(finding: Finding) -> str:
    """Return what the reader must know of a verdict's ground."""
    fewest = min(len(finding.base), len(finding.candidate))
    if fewest == 0:
        return ": not measured"
    if finding.interval is None:
        return ": the spread of a single run is unknown" if fewest == 1 else ": a value is 0 or less"
    return "; few runs: treat as a hint" if fewest < FEW_RUNS else ""


def _sizes(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line on each change that was claimed with a number."""
    for finding in findings:
        claimed, metric = finding.claim.claimed_change, finding.claim.metric
        if claimed is None:
            continue
        there = _change(finding.published_base, finding.published_candidate)
        here = (
            f"{fmean(finding.candidate) - fmean(finding.base):+.3f}" if finding.base and finding.candidate else "none"
        )
        yield ""
        yield (
            f"Claimed change of {metric.name}: about {claimed:+g} {metric.unit}. Published tables: {there}."
            f" Here: {here} (another machine, so only the sign can be compared)."
        )


def _change(base: Moments | None, candidate: Moments | None) -> str:
    return f"{candidate.mean - base.mean:+.3f}" if base and candidate else "none"
