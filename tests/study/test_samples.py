"""Runs as they are compared: from their requests where they kept them, else from their summaries."""

import json
from dataclasses import replace

import numpy as np
import pytest

from headrace.bench.record import PHASES, STATUSES, empty_records, write_records
from headrace.errors import OutputError
from headrace.study import samples
from headrace.study.compare import Selection, compare, load_side
from headrace.study.compare_page import render_markdown
from headrace.study.compare_report import render_json
from headrace.study.finished import RUNS, FoundRun
from tests.study.summaries import summary, write_run

MS = 1_000_000


def records_of(responses_ms, rows=2, gap_ms=10):
    """One warm-up request of 5 s, then a measured one every `gap_ms`, in an order that is not the plan's."""
    records = empty_records(1 + len(responses_ms))
    records["phase"] = PHASES.index("measured")
    records["phase"][0] = PHASES.index("first")
    records["rows"] = rows
    scheduled = np.arange(len(records)) * gap_ms * MS
    records["scheduled_ns"] = records["issued_ns"] = scheduled + 1
    records["completed_ns"] = records["scheduled_ns"] + (np.array([5000, *responses_ms]) * MS).astype(np.int64)
    records["status"] = STATUSES.index("ok")
    return np.concatenate((records[:1], records[1:][::-1]))


def run_folder(path, responses_ms, **options):
    write_run(path, summary(**options))
    write_records(records_of(responses_ms), path / samples.RECORDS)
    return FoundRun(folder=path, summary=summary(**options))


def test_a_runs_numbers_are_computed_from_its_requests(tmp_path):
    run = samples.read_run(run_folder(tmp_path / "r3-b002-eager-original-w1", [30.0, 10.0, 20.0]))
    assert run.summary.metrics.response_time.mean == pytest.approx(0.02)
    assert run.summary.metrics.requests == 3
    assert run.sample.response_s == pytest.approx([0.03, 0.01, 0.02])  # in the order of the plan
    assert (run.repeat, run.has_records) == (3, True)


def test_goodput_counts_rows_within_the_bound(tmp_path):
    run = samples.read_run(run_folder(tmp_path / "a", [30.0, 10.0, 20.0]))
    assert run.sample.window_s == pytest.approx(0.04)  # from 10 ms to 30 + 20 ms
    assert run.sample.goodput(0.02) == pytest.approx(2 * 2 / 0.04)
    assert run.sample.goodput(0.0199) == pytest.approx(1 * 2 / 0.04)
    assert run.repeat is None


def test_percentiles_are_of_all_requests_together(tmp_path):
    sides = ([1.0] * 99 + [1000.0], [2.0] * 300)
    read = [samples.read_run(run_folder(tmp_path / str(index), side)).sample for index, side in enumerate(sides)]
    pooled = np.percentile(np.concatenate(sides) / 1e3, 99)
    assert samples.pooled_percentile(read, 99) == pytest.approx(pooled)
    assert pooled == pytest.approx(0.002)  # the mean of the two runs' p99s would be 0.0065


def test_a_run_with_an_unanswered_request_has_no_sample(tmp_path):
    found = run_folder(tmp_path / "a", [30.0, 10.0])
    records = records_of([30.0, 10.0])
    records["status"][1] = STATUSES.index("unanswered")
    write_records(records, found.folder / samples.RECORDS)
    run = samples.read_run(found)
    assert (run.sample, run.has_records, run.summary.metrics.unanswered) == (None, True, 1)


def test_damaged_records_are_refused(tmp_path):
    found = run_folder(tmp_path / "a", [30.0])
    (found.folder / samples.RECORDS).write_bytes(b"not parquet")
    with pytest.raises(OutputError, match=r"requests.parquet: cannot be read"):
        samples.read_run(found)


def sweep(path, *, design, factor, number=5, growing=False):
    rng = np.random.default_rng(1 if design == "original" else 2)
    for repeat in range(number):
        speed = factor * (1 + 0.01 * repeat)
        responses = speed * rng.gamma(4, 5, 400) + (np.arange(400) if growing else 0)
        run_folder(path / RUNS / f"r{repeat}-b032-eager-{design}-w1", responses, design=design)


def sides(path):
    return [load_side(Selection(path=path, experiment=name)) for name in ("original", "executor")]


def test_a_comparison_pools_percentiles_and_compares_goodput(tmp_path):
    sweep(tmp_path, design="original", factor=1.0)
    sweep(tmp_path, design="executor", factor=0.5)
    base, candidate = sides(tmp_path)
    comparison = compare(base, candidate, bound_s=0.02)
    rows = {row.compared.quantity.name: row for row in comparison.cells[0].rows}
    everything = np.concatenate([run.sample.response_s for run in base.runs])
    p99 = rows["p99 response time"]
    assert (p99.pooled, p99.base) == (True, pytest.approx(np.percentile(everything, 99)))
    assert p99.compared.verdict.startswith("faster by")
    assert rows["goodput within 0.02 s"].compared.verdict.startswith("faster by")
    assert "p99 response time (s, of all requests)" in render_markdown(comparison)
    assert comparison.warnings == ()


def test_goodput_is_compared_within_the_runs_own_bound(tmp_path):
    sweep(tmp_path, design="original", factor=1.0)
    sweep(tmp_path, design="executor", factor=0.5)
    bounded = []
    for side in sides(tmp_path):
        load = replace(side.runs[0].summary.options.load, bound_s=0.02)
        options = [replace(run.summary.options, load=load) for run in side.runs]
        runs = [
            replace(run, summary=replace(run.summary, options=each))
            for run, each in zip(side.runs, options, strict=True)
        ]
        bounded.append(replace(side, runs=tuple(runs)))
    names = [row.compared.quantity.name for row in compare(*bounded).cells[0].rows]
    assert names[-1] == "goodput within 0.02 s"


def test_runs_without_requests_are_compared_by_their_summaries_and_it_is_said(tmp_path):
    sweep(tmp_path, design="original", factor=1.0)
    sweep(tmp_path, design="executor", factor=0.5)
    (tmp_path / RUNS / "r0-b032-eager-executor-w1" / samples.RECORDS).unlink()
    base, candidate = sides(tmp_path)
    comparison = compare(base, candidate, bound_s=0.02)
    assert comparison.warnings == (
        f"{candidate.label}: 1 of 5 runs kept no requests; their values are those of their summaries, and no percentile"
        " is of all requests",
    )
    rows = {row["name"]: row for row in json.loads(render_json(comparison))["cells"][0]["quantities"]}
    assert rows["p99 response time"]["of_all_requests"] is False
    assert rows["p99 response time"]["candidate"] == np.median(rows["p99 response time"]["candidate_runs"])
    assert len(rows["goodput within 0.02 s"]["candidate_runs"]) == 4


def test_runs_that_were_not_steady_are_told(tmp_path):
    sweep(tmp_path, design="original", factor=1.0)
    sweep(tmp_path, design="executor", factor=1.0, growing=True)
    (warning,) = compare(*sides(tmp_path)).warnings
    assert ": 5 of 5 runs not steady, as one: response times grew (" in warning


def test_a_lone_run_has_an_interval_for_its_own_p99_or_is_told_to_be_longer(tmp_path):
    rng = np.random.default_rng(0)
    for design, number in (("original", 2000), ("executor", 400)):
        run_folder(tmp_path / RUNS / f"r0-{design}", rng.gamma(4, 5, number), design=design)
    (cell,) = compare(*sides(tmp_path)).cells
    assert cell.notes[0].startswith(f"{tmp_path}:original: the p99 of its one process lies at 0.0")
    assert "p99 of 400 requests" in cell.notes[1]
    assert "measure longer" in cell.notes[1]


def test_what_was_read_does_not_change_the_options(tmp_path):
    found = run_folder(tmp_path / "a", [30.0, 10.0])
    read = samples.read_run(found).summary
    assert replace(read, metrics=found.summary.metrics) == found.summary
