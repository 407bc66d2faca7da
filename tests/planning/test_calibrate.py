"""What is fitted is what the runs were made of; what cannot be used is refused with the reason."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.errors import IncomparableRuns, OutputError, RunFailed
from headrace.planning.calibrate import calibrate
from headrace.planning.law import Curve, ServiceLaw
from headrace.planning.observe import lane_batches, observe, read_runs
from tests.planning.worlds import made_records, summary_of, write_run

MS = 1e-3


def lone_run(name, rows, service_s, count=200, late=()):
    """One in flight: each takes `service_s`, those in `late` 30 ms more."""
    took = np.full(count, service_s)
    took[list(late)] += 30 * MS
    completed = np.cumsum(took + MS)
    records = made_records(completed - took, completed, rows)
    return observe(name, summary_of(records, rows=rows), records)


def lanes_run(count=400):
    """Two lanes, always two batches on each: a batch runs for 4 ms from the end of the one in front of it."""
    records = empty_records(2 * count)
    records["phase"], records["status"] = PHASES.index("measured"), STATUSES.index("ok")
    records["rows"] = records["batch_rows"] = 1
    ends = 10**9 + (1 + np.arange(count)) * 4_000_000
    records["worker"] = np.repeat([0, 1], count)
    records["computed_ns"] = np.concatenate([ends, ends + 1])
    launched = records["computed_ns"] - 7_000_000  # while the one in front still runs
    for name in ("scheduled_ns", "issued_ns", "received_ns", "started_ns"):
        records[name] = launched
    records["responded_ns"] = records["completed_ns"] = records["computed_ns"]
    return records


def test_a_batch_behind_another_runs_from_its_predecessors_end():
    batches = lane_batches(lanes_run(), (1,))
    later = batches.behind
    assert later.sum() == 2 * 399
    assert batches.seconds[later] == pytest.approx(4 * MS)
    assert np.median(batches.running) == pytest.approx(2, rel=0.01)


def test_the_law_has_what_batches_took_at_the_levels_at_which_they_ran():
    records = lanes_run()
    run = observe("two", summary_of(records, lanes=2, depth=2, concurrency=4), records)
    law = calibrate([run, lone_run("one", 1, 3 * MS)]).law
    assert law.at(1, 2) == pytest.approx(4 * MS, rel=0.01)
    assert law.at(1, 1) == pytest.approx(3 * MS, rel=0.01)
    assert law.at(1, 1.5) == pytest.approx(3.5 * MS, rel=0.02)


def test_pauses_are_counted_with_their_lengths_and_spoil_no_law():
    model = calibrate([lone_run("paused", 1, 2 * MS, late=(50, 120, 121))])
    assert model.law.at(1, 1) == pytest.approx(2 * MS, rel=0.01)
    assert len(model.pauses.lengths) == 3
    assert model.pauses.lengths == pytest.approx(30 * MS, rel=0.02)
    assert calibrate([lone_run("paused", 1, 2 * MS, late=(50,))], pauses=False).pauses.share == 0


def test_rows_between_measured_buckets_are_on_a_line_and_beyond_them_marked():
    law = ServiceLaw((2, 4), (Curve((1.0, 2.0), (2.0, 3.0)), Curve((1.0, 2.0), (4.0, 6.0))))
    assert [law.at(rows, 1) for rows in (1, 2, 3, 4, 8)] == [2, 2, 3, 4, 8]
    assert law.at(4, 4) == 12
    assert law.outside(3, 2) is None
    assert "buckets of 8 rows: measured were 2 to 4" in str(law.outside(8, 1))
    assert "16 batches at once" in str(law.outside(4, 16))


def test_runs_of_unlike_settings_are_refused_and_what_differs_is_named(tmp_path):
    records = made_records(np.arange(1.0, 30), np.arange(1.0, 30) + 0.5)
    summary = summary_of(records)
    write_run(tmp_path / "a", records, summary)
    other = replace(summary.options, model=replace(summary.options.model, precision="fp16"))
    write_run(tmp_path / "b", records, replace(summary, options=other))
    with pytest.raises(IncomparableRuns, match="precision: bf16 and fp16"):
        read_runs([tmp_path])


def test_runs_of_unlike_machines_are_refused(tmp_path):
    records = made_records(np.arange(1.0, 30), np.arange(1.0, 30) + 0.5)
    summary = summary_of(records)
    write_run(tmp_path / "a", records, summary)
    write_run(tmp_path / "b", records, replace(summary, environment=replace(summary.environment, gpu_name="T4")))
    with pytest.raises(IncomparableRuns, match=r"GPU: .*H100.* and T4"):
        read_runs([tmp_path / "a", tmp_path / "b"])


def test_runs_may_differ_in_load_batches_and_lanes(tmp_path):
    records = made_records(np.arange(1.0, 30), np.arange(1.0, 30) + 0.5)
    write_run(tmp_path / "a", records, summary_of(records))
    write_run(tmp_path / "b", records, summary_of(records, rows=4, lanes=2, depth=3, concurrency=7))
    assert [run.setup.lanes for run in read_runs([tmp_path])] == [1, 2]


def test_a_run_without_records_is_refused(tmp_path):
    records = made_records(np.arange(1.0, 30), np.arange(1.0, 30) + 0.5)
    folder = write_run(tmp_path / "a", records, summary_of(records))
    (folder / "requests.parquet").unlink()
    with pytest.raises(OutputError, match=r"requests\.parquet: .* not there"):
        read_runs([tmp_path])


def test_a_run_with_errors_is_refused(tmp_path):
    records = made_records(np.arange(1.0, 30), np.arange(1.0, 30) + 0.5)
    records["status"][3] = STATUSES.index("error")
    write_run(tmp_path / "a", records, summary_of(records))
    with pytest.raises(RunFailed, match="1 errors"):
        read_runs([tmp_path])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no finished run there"):
        read_runs([tmp_path])
