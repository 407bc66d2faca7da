"""A comparison as JSON, for programs."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.bench.summary import encode
from headrace.study.compare import ComparedCell, ComparedRow, Comparison
from headrace.study.welch import CONFIDENCE, RatioInterval

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRow:
    """One quantity of a cell. None where there is no interval; an end that is not finite is null."""

    name: str
    unit: str
    higher_is_better: bool | None
    base: float
    candidate: float
    of_all_requests: bool
    base_runs: tuple[float, ...]
    candidate_runs: tuple[float, ...]
    ratio: RatioInterval | None
    paired: bool | None
    base_against_itself: RatioInterval | None
    void: bool
    more_runs: int | None  # of each side; None where none are needed, and where no sensible number is enough
    more_runs_cautious: int | None
    underpowered: bool
    verdict: str

    @classmethod
    def of(cls, row: ComparedRow) -> ReportedRow:
        compared = row.compared
        return cls(
            name=compared.quantity.name,
            unit=compared.quantity.unit,
            higher_is_better=compared.quantity.higher_is_better,
            base=row.base,
            candidate=row.candidate,
            of_all_requests=row.pooled,
            base_runs=compared.base.values,
            candidate_runs=compared.candidate.values,
            ratio=compared.ratio.interval if compared.ratio else None,
            paired=compared.ratio.paired if compared.ratio else None,
            base_against_itself=compared.itself.interval if compared.itself else None,
            void=compared.void,
            more_runs=compared.more.likely if compared.more else None,
            more_runs_cautious=compared.more.cautious if compared.more else None,
            underpowered=compared.more is not None,
            verdict=compared.verdict,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCell:
    batch_size: int
    compile: bool
    experiment: str | None
    quantities: tuple[ReportedRow, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, cell: ComparedCell) -> ReportedCell:
        return cls(
            batch_size=cell.key.batch_size,
            compile=cell.key.compile,
            experiment=cell.experiment,
            quantities=tuple(ReportedRow.of(row) for row in cell.rows),
            notes=cell.notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    schema_version: int
    base: str
    candidate: str
    machine: str
    base_revisions: tuple[str, ...]
    candidate_revisions: tuple[str, ...]
    changed_options: tuple[str, ...]
    confidence: float
    threshold: float
    warnings: tuple[str, ...]
    cells: tuple[ReportedCell, ...]


def render_json(comparison: Comparison) -> str:
    """Return the comparison as indented JSON."""
    report = Report(
        schema_version=SCHEMA_VERSION,
        base=comparison.base,
        candidate=comparison.candidate,
        machine=comparison.machine,
        base_revisions=comparison.base_revisions,
        candidate_revisions=comparison.candidate_revisions,
        changed_options=comparison.changed,
        confidence=CONFIDENCE,
        threshold=comparison.threshold,
        warnings=comparison.warnings,
        cells=tuple(ReportedCell.of(cell) for cell in comparison.cells),
    )
    return encode(report).decode()
