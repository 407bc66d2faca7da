"""Counters that several processes write and read: sums are right, nothing is lost with a process, nothing is torn."""

import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidOption
from headrace.frontend.board import FAILURES, MODELS, MORE_MODELS, STAGES, Board, make_board
from headrace.frontend.scale import BATCH_ROWS, RESPONSE_NS
from headrace.transport.descriptors import ANSWER, Descriptor
from headrace.transport.pair import DupFdHolder

WAIT_S = 60


def told(rows, batch_rows, lane=0):
    """What a backend says of a request that began at 0: 100 ns before, 200 queue, 300 compute, 50 respond."""
    return Descriptor(1, ANSWER, 0, rows, lane, batch_rows, 0, 100, 300, 600, 650)


@pytest.fixture
def fd():
    descriptor = make_board(3)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def board(fd):
    return Board.attach(fd)


def test_every_reader_sees_the_sums_over_all_frontends(fd, board):
    slot = board.slot("m", "1")
    for frontend in range(3):
        row = Board.attach(fd).row(frontend, slot)
        row.succeeded(0, 700, 2, told(2, 4, lane=frontend))
        row.failed("model", 10 + frontend)
        row.hold(frontend, 10, 16)
    (totals,) = Board.attach(fd).totals()
    assert (totals.name, totals.version) == ("m", "1")
    assert (totals.requests, totals.rows, totals.request_ns) == (3, 6, 2100)
    assert totals.stage_ns == {"before": 300, "queue": 600, "compute": 900, "respond": 150, "after": 150}
    assert totals.failure_count == dict.fromkeys(FAILURES, 0) | {"model": 3}
    assert totals.failure_ns["model"] == 33
    assert (totals.in_flight, totals.rows_free, totals.rows_room) == (3, 30, 48)
    assert totals.response_counts[RESPONSE_NS.index(700)] == sum(totals.response_counts) == 3
    assert totals.lane_batches[:4] == [0.5, 0.5, 0.5, 0]
    assert totals.lane_ns[:4] == [150, 150, 150, 0]


def test_models_have_counters_of_their_own(board):
    first, second = board.slot("m", "1"), board.slot("m", "2")
    assert first != second
    board.row(0, second).succeeded(0, 700, 1, told(1, 1))
    assert [(totals.version, totals.requests) for totals in board.totals()] == [("1", 0), ("2", 1)]


def test_a_model_keeps_its_slot(fd, board):
    assert board.slot("m", "1") == board.slot("m", "1") == Board.attach(fd).slot("m", "1")
    assert board.models == 1


def test_models_beyond_the_room_share_the_last_counters(board):
    slots = [board.slot(f"m{number}", "1") for number in range(MODELS + 3)]
    assert slots == [*range(MODELS - 1), *[MODELS - 1] * 4]
    assert board.totals()[-1].name == MORE_MODELS
    assert board.slot("m5", "1") == 5


def test_a_name_that_does_not_fit_is_refused(board):
    with pytest.raises(InvalidOption, match="has 249 bytes; --name must have at most 248"):
        board.slot("m" * 249, "1")


def test_a_frontend_that_begins_anew_goes_on_counting_and_holds_nothing(fd, board):
    slot = board.slot("m", "1")
    board.row(1, slot).succeeded(0, 700, 2, told(2, 2))
    board.row(1, slot).hold(5, 1, 16)
    board.row(2, slot).hold(1, 15, 16)
    successor = Board.attach(fd)
    successor.forget_held(1)
    successor.row(1, slot).succeeded(0, 700, 3, told(3, 3))
    (totals,) = board.totals()
    assert (totals.requests, totals.rows, totals.in_flight, totals.rows_room) == (2, 5, 1, 16)


def test_restarts_of_a_backend_are_counted(board):
    slot = board.slot("m", "1")
    board.restarted(slot)
    board.restarted(slot)
    assert board.totals()[0].restarts == 2


def test_nobody_can_change_the_memorys_size(fd):
    for size in (0, 1 << 30):
        with pytest.raises(OSError, match="Operation not permitted"):
            os.ftruncate(fd, size)


def test_a_model_without_requests_has_no_last_one(board):
    slot = board.slot("m", "1")
    assert board.totals()[0].last_ms == 0
    board.row(0, slot).succeeded(0, 700, 1, told(1, 1))
    assert board.totals()[0].last_ms > 0


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), max_size=30))
def test_the_parts_of_batches_add_up_to_batches(batches):
    board = Board.private()
    row = board.row(0, board.slot("m", "1"))
    for requests in batches:
        for rows in requests:
            row.succeeded(0, 700, rows, told(rows, sum(requests)))
    (totals,) = board.totals()
    assert totals.batches == len(batches)
    assert totals.rows == sum(map(sum, batches))
    for index, count in enumerate(totals.batch_counts):
        sizes = [sum(requests) for requests in batches if BATCH_ROWS.index(sum(requests)) == index]
        assert round(count) == len(sizes)
        assert totals.batch_ns[index] == pytest.approx(300 * len(sizes))


@given(st.lists(st.integers(0, 10**11), min_size=5, max_size=5))
def test_the_stages_of_a_request_add_up_to_its_time(steps):
    received, started, computed, responded, ended = (sum(steps[: count + 1]) + 7 for count in range(5))
    board = Board.private()
    words = Descriptor(1, ANSWER, 0, 1, 0, 1, 0, received, started, computed, responded)
    board.row(0, board.slot("m", "1")).succeeded(7, ended, 1, words)
    (totals,) = board.totals()
    assert list(totals.stage_ns.values()) == steps
    assert tuple(totals.stage_ns) == STAGES
    assert totals.response_counts[RESPONSE_NS.index(sum(steps))] == 1


def count_many(holder, frontend, times):
    row = Board.attach(holder.fd).row(frontend, 0)
    for _ in range(times):
        row.succeeded(0, 700, 1, told(1, 2))


def test_a_reader_never_sees_a_counter_that_was_not(fd, board):
    board.slot("m", "1")
    times = 20_000
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=count_many, args=(DupFdHolder(fd), number, times)) for number in range(2)]
    for writer in writers:
        writer.start()
    seen = [0]
    while any(writer.is_alive() for writer in writers):
        seen.append(board.totals()[0].requests)
    for writer in writers:
        writer.join(WAIT_S)
        assert writer.exitcode == 0
    assert seen == sorted(seen)
    (totals,) = board.totals()
    assert (totals.requests, totals.rows, totals.batches) == (2 * times, 2 * times, times)
