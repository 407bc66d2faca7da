"""What is fitted is what the runs were made of; what cannot be used is refused with the reason."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.errors import IncomparableRuns, OutputError, RunFailed
from headrace.planning.calibrate import calibrate
from headrace.planning.law import Curve, Power, ServiceLaw
from headrace.planning.observe import lane_batches, observe, read_runs
from tests.planning.worlds import made_records, setup, summary_of, write_run

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
    batches = lane_batches(lanes_run(), setup())
    later = batches.waited > 0
    assert later.sum() == 2 * 399
    assert batches.seconds[later] == pytest.approx(4 * MS)
    assert batches.waited[later] == pytest.approx(3 * MS, abs=MS * 1e-3)
    assert np.median(batches.running(lambda rows: 1.0)) == pytest.approx(2, rel=0.01)


def test_the_law_has_what_batches_took_at_the_levels_at_which_they_ran():
    records = lanes_run()
    run = observe("two", summary_of(records, lanes=2, depth=2, concurrency=4), records)
    law = calibrate([run, lone_run("one", 1, 3 * MS)]).law
    assert law.at(1, 2) == pytest.approx(4 * MS, rel=0.01)
    assert law.at(1, 1) == pytest.approx(3 * MS, rel=0.01)
    assert law.at(1, 1.5) == pytest.approx(3.5 * MS, rel=0.02)


def padded_run(name, rows, bucket, service_s, **changes):
    """One in flight, each filling a part of its bucket."""
    completed = np.cumsum(np.full(200, service_s + MS))
    records = made_records(completed - service_s, completed, rows)
    return observe(name, summary_of(records, rows=rows, buckets=(bucket,), **changes), records)


def test_a_cpu_computes_the_rows_that_there_are_and_a_gpu_those_of_the_bucket():
    assert set(padded_run("GPU", 3, 4, 2 * MS).batches.rows) == {4}
    plain = padded_run("CPU", 3, 4, 2 * MS, device="cpu")
    model = plain.summary.options.model
    assert set(padded_run("CPU", 3, 4, 2 * MS, device="cpu", model=replace(model, compile=False)).batches.rows) == {3}
    assert set(plain.batches.rows) == {4}  # compiled for its buckets


def test_batches_of_unlike_rows_count_by_what_they_take_of_a_full_device():
    records = empty_records(3)
    records["phase"], records["status"] = PHASES.index("measured"), STATUSES.index("ok")
    records["rows"] = records["batch_rows"] = [1, 8, 1]
    records["worker"] = [0, 1, 2]
    for name in ("scheduled_ns", "issued_ns", "received_ns", "started_ns"):
        records[name] = [1000, 1000, 1000]
    for name in ("computed_ns", "responded_ns", "completed_ns"):
        records[name] = [2000, 2000, 1500]
    batches = lane_batches(records, setup(buckets=(1, 8), lanes=3))
    work = {1: 1.0, 8: 4.0}
    assert batches.running(work.__getitem__).tolist() == pytest.approx([5.5, 1.375, 6])


def run_of_lanes(name, rows, lanes, each_s, idle_s, count=300):
    """All lanes begin together, each with one batch at a time, and rest between: every lane is found idle."""
    records = empty_records(lanes * count)
    records["phase"], records["status"] = PHASES.index("measured"), STATUSES.index("ok")
    records["rows"] = records["batch_rows"] = rows
    records["worker"] = np.repeat(np.arange(lanes), count)
    begin = 10**9 + (np.tile(np.arange(count), lanes) * (each_s + idle_s + MS) * 1e9).astype(np.int64)
    for stamp in ("scheduled_ns", "issued_ns", "received_ns", "started_ns"):
        records[stamp] = begin
    for stamp in ("computed_ns", "responded_ns", "completed_ns"):
        records[stamp] = begin + int((each_s + idle_s) * 1e9) + records["worker"]
    return observe(name, summary_of(records, rows=rows, lanes=lanes, concurrency=lanes), records)


def test_what_a_batch_of_some_rows_does_not_show_beside_others_is_taken_from_other_rows():
    runs = [
        run_of_lanes("small alone", 1, 1, 2 * MS, 0),
        run_of_lanes("small, two", 1, 2, 3 * MS, 0),
        run_of_lanes("large alone", 4, 1, 8 * MS, 0),
    ]
    law = calibrate(runs).law
    assert law.at(4, 1) == pytest.approx(8 * MS, rel=0.01)
    assert law.at(4, 2) == pytest.approx(12 * MS, rel=0.02)


def behind_run(name, rows, each_s, count=400):
    """One lane that always has the next batch queued for as long as the one in front runs."""
    records = empty_records(count)
    records["phase"], records["status"] = PHASES.index("measured"), STATUSES.index("ok")
    records["rows"] = records["batch_rows"] = rows
    ends = 10**9 + ((1 + np.arange(count)) * each_s * 1e9).astype(np.int64)
    for stamp in ("scheduled_ns", "issued_ns", "received_ns", "started_ns"):
        records[stamp] = ends - int(1.9 * each_s * 1e9)
    for stamp in ("computed_ns", "responded_ns", "completed_ns"):
        records[stamp] = ends
    return observe(name, summary_of(records, rows=rows, depth=2, concurrency=2), records)


def test_what_an_idle_lane_costs_is_told_apart_and_grows_with_the_rows():
    runs = [
        behind_run("small, busy", 2, 2 * MS),
        run_of_lanes("small, idle", 2, 1, 2 * MS, 0.2 * MS),
        behind_run("large, busy", 4, 3 * MS),
        run_of_lanes("large, idle", 4, 1, 3 * MS, 0.6 * MS),
    ]
    model = calibrate(runs)
    assert [model.idle.at(rows) for rows in (2, 3, 4, 8)] == pytest.approx(
        [0.2 * MS, 0.4 * MS, 0.6 * MS, 1.4 * MS], rel=0.02
    )
    assert [model.law.at(rows, 1) for rows in (2, 4)] == pytest.approx([2 * MS, 3 * MS], rel=0.02)


def test_how_long_a_client_takes_to_send_again_is_learned_from_closed_loops_only():
    closed = lone_run("closed", 1, 2 * MS)
    load = replace(closed.summary.options.load, kind="constant", rate=300.0)
    summary = replace(closed.summary, options=replace(closed.summary.options, load=load))
    open_run = observe("open", summary, closed.records)
    mixed = calibrate([closed, open_run]).alike(1, 300, np.random.default_rng(0), closed=True)
    assert mixed.again() == pytest.approx(1 * MS, rel=0.01)
    alone = calibrate([open_run]).alike(1, 300, np.random.default_rng(0), closed=True)
    assert alone.again().tolist() == [0.0]


def test_pauses_are_counted_with_their_lengths_and_spoil_no_law():
    model = calibrate([lone_run("paused", 1, 2 * MS, late=(50, 120, 121))])
    assert model.law.at(1, 1) == pytest.approx(2 * MS, rel=0.01)
    assert len(model.pauses.lengths) == 3
    assert model.pauses.lengths == pytest.approx(30 * MS, rel=0.02)
    assert calibrate([lone_run("paused", 1, 2 * MS, late=(50,))], pauses=False).pauses.share == 0


def test_rows_between_measured_ones_follow_a_power_and_those_beyond_a_line_and_are_marked():
    law = ServiceLaw((2, 4), (Curve((1.0, 2.0), (2.0, 3.0)), Curve((1.0, 2.0), (4.0, 6.0))), Power((2, 4), (1.0, 2.0)))
    assert [law.at(rows, 1) for rows in (1, 2, 3, 4, 8)] == pytest.approx([2, 2, 3, 4, 8])
    small = ServiceLaw((1, 16), (Curve((1.0,), (1.0,)), Curve((1.0,), (4.0,))), Power((1, 16), (1.0, 4.0)))
    assert [small.at(rows, 1) for rows in (4, 32)] == pytest.approx([2, 7.2])
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
