"""What was not fitted is predicted: runs of the real dispatcher on this machine, and committed ones of an H100."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.clock import now_ns
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.planning.holdout import leave_one_out
from headrace.planning.observe import observe, read_runs
from headrace.request import Ticket
from tests.planning.worlds import H100, RESULTS, summary_of

ATTEMPTS = 3  # other processes may take the cores for longer than a whole run lasts


class TimedLane:
    """A thread that runs batches in order, each for as long as its rows ask for."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)

    def launch(self, batch):
        batch.token = self._thread.submit(time.sleep, (3 + batch.bucket) * 1e-3)

    def done(self, batch):
        return batch.token.done()

    def wait(self, batch):
        batch.token.result()

    def close(self):
        self._thread.shutdown()


class ClosedLoop:
    """Keeps requests in flight, each answer making the next one due, and stamps them."""

    def __init__(self, count, rows, in_flight):
        self.table = object()
        self.records = empty_records(count)
        self.records["phase"] = PHASES.index("measured")
        self.records["rows"] = rows
        self._sent, self._answered = 0, 0
        self._rows, self._in_flight = rows, in_flight
        self._all = threading.Event()

    def run(self, dispatcher):
        self._dispatcher = dispatcher
        for _ in range(self._in_flight):
            self._send()
        assert self._all.wait(60)

    def finish(self, tickets):
        for ticket in tickets:
            record = self.records[ticket.index]
            record["started_ns"], record["computed_ns"] = ticket.started_ns, ticket.computed_ns
            record["worker"], record["batch_rows"] = ticket.lane, ticket.batch_rows
            record["responded_ns"] = record["completed_ns"] = now_ns()
            record["status"] = STATUSES.index("ok")
        self._answered += len(tickets)
        for _ in tickets:
            self._send()
        if self._answered == len(self.records):
            self._all.set()

    def _send(self):
        if self._sent < len(self.records):
            index, self._sent = self._sent, self._sent + 1
            record = self.records[index]
            record["scheduled_ns"] = record["issued_ns"] = record["received_ns"] = now_ns()
            # No two requests lie side by side in the table, and none has its memory read.
            self._dispatcher.submit([Ticket(self, index, 1000 * index, self._rows, int(record["received_ns"]))])


def measured(name, *, rows, lanes, in_flight, count=150):
    real = [TimedLane() for _ in range(lanes)]
    loop = ClosedLoop(count, rows, in_flight)
    dispatcher = Dispatcher(real, BatchingConfig(buckets=(rows,)), depth=2)
    dispatcher.start()
    loop.run(dispatcher)
    dispatcher.stop()
    for lane in real:
        lane.close()
    summary = summary_of(loop.records, rows=rows, lanes=lanes, depth=2, concurrency=in_flight)
    return observe(name, summary, loop.records)


def test_the_real_dispatcher_does_what_is_predicted_of_another_batch_size_number_of_lanes_and_load():
    tried = []
    for _ in range(ATTEMPTS):
        runs = [
            measured("small", rows=1, lanes=1, in_flight=4),
            measured("large", rows=8, lanes=1, in_flight=4),
            measured("two lanes", rows=8, lanes=2, in_flight=8),
            measured("between", rows=4, lanes=1, in_flight=6),
            measured("lone", rows=4, lanes=1, in_flight=1),
        ]
        checked = {run.name: each for run, each in zip(runs, leave_one_out(runs, seed=0), strict=True)}
        # The two in the middle lie within what the others measured; "two lanes" has no other run of two lanes.
        queued, lone = checked["between"], checked["lone"]
        # With one in flight, p99 of 150 is the second longest pause of the machine, which no other run can tell.
        errors = [queued.throughput_error, lone.throughput_error, queued.p99_error / 2, lone.p50_error / 2]
        tried.append(errors)
        if max(map(abs, errors)) < 0.1:
            break
    else:
        raise AssertionError(f"errors of throughput, twice, and half of those of p99 and p50: {tried}")
    assert checked["two lanes"].outside is not None
    assert "batches at once" in checked["two lanes"].outside


def test_committed_runs_of_an_h100_are_predicted_by_runs_of_other_batch_sizes():
    runs = read_runs([H100 / f"bf16-b{size}.0" for size in (8, 32, 64, 128)])
    checked = {run.setup.rows: each for run, each in zip(runs, leave_one_out(runs, seed=0), strict=True)}
    for rows in (32, 64):  # the others are at the edges
        assert abs(checked[rows].throughput_error) < 0.1
        assert abs(checked[rows].p99_error) < 0.2
        assert not checked[rows].missed


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (
            "nvidia-h100-80gb",
            (
                *("b1-16_lanes-burst.0", "b1-16_lanes-poisson_11000.0", "b1-8_lanes-burst.0", "b1-4_lanes-burst.0"),
                *("b1-1_lane-burst.0", "to8-4_lanes-poisson_11000.0", "to8-4_lanes-burst.0", "b8-4_lanes-burst.0"),
            ),
        ),
        (
            "cpu-intel-xeon-2",
            (
                *("b1-1_lane-burst.0", "b1-1_lane-closed_1.0", "b1-2_lanes-burst.0", "b4-2_lanes-burst.0"),
                *("b8-1_lane-burst.0", "b8-2_lanes-burst.0", "to8-1_lane-burst.0", "to8-1_lane-closed_6.0"),
                *("b4-1_lane-burst.0", "b16-1_lane-burst.0", "b16-2_lanes-burst.0"),
            ),
        ),
    ],
)
def test_single_requests_and_mixed_batches_are_predicted_from_other_loads_lanes_and_sizes(folder, names):
    runs = read_runs([RESULTS / folder / "plan" / "runs" / name for name in names])
    checked = dict(zip(names, leave_one_out(runs, seed=0), strict=True))
    assert {name: each.missed for name, each in checked.items() if each.missed} == {}


def test_one_configuration_alone_says_nothing_of_the_models_error():
    runs = read_runs([H100 / f"bf16-b32.{repeat}" for repeat in (0, 1)])
    assert leave_one_out(runs, seed=0) == []


def test_errors_repeat_with_the_seed():
    runs = read_runs([H100 / f"bf16-b{size}.0" for size in (64, 128)])
    first, again, other = (leave_one_out(runs, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert np.isfinite([each.p99_error for each in first]).all()
