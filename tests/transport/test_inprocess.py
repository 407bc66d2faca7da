"""The in-process transport: callers wait for rows and for answers, and get their own copies of both."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.errors import EngineStopped, InvalidRequest, ModelError, QueueFull
from headrace.tensors import TensorSpec
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import PAGE, Layout

WAIT_S = 60
ROWS = 4


class Device:
    """Remembers what it was told to register, and to forget."""

    def __init__(self):
        self.registered = []
        self.forgotten = 0

    def register(self, memory):
        self.registered.append(memory)
        return self.forget

    def forget(self):
        self.forgotten += 1


def source_of(rows=ROWS, device=None):
    layout = Layout(
        rows=rows,
        inputs=(
            TensorSpec(name="ids", dtype="int64", features=(2,)),
            TensorSpec(name="mask", dtype="bool", features=()),
        ),
        outputs=(TensorSpec(name="scores", dtype="float32", features=(3,)),),
    )
    return LocalSource(layout, (device or Device()).register)


def request(rows, value=1):
    return [torch.full((rows, 2), value), torch.ones(rows, dtype=torch.bool)]


def answer(source, ticket, value):
    """Do what a lane and the dispatcher do with a ticket."""
    source.table.outputs[0][ticket.first_row : ticket.first_row + ticket.rows] = value
    source.finish([ticket])


def wait_until_waiting(source, callers=1):
    """Return when so many callers wait for room."""
    while len(source._changed._waiters) < callers:
        pass


def test_a_requests_tensors_are_copied_into_rows_of_their_own():
    source = source_of()
    inputs = request(1, 10), request(2, 20)
    first, second = (source.place(tensors, 0) for tensors in inputs)
    inputs[0][0].fill_(99)
    assert [(ticket.first_row, ticket.rows) for ticket in (first, second)] == [(0, 1), (1, 2)]
    assert source.table.inputs[0].tolist() == [[10, 10], [20, 20], [20, 20], [0, 0]]
    assert source.table.inputs[1].tolist() == [True, True, True, False]
    assert 0 < first.received_ns <= second.received_ns
    assert first.source is source


def test_an_answer_is_the_callers_own_copy():
    source = source_of()
    first, second = source.place(request(1), 0), source.place(request(2), 0)
    source.table.outputs[0].copy_(torch.arange(12).reshape(4, 3))
    source.finish([first, second])
    source.table.outputs[0].zero_()
    assert [output.tolist() for output in first.future.result(0)] == [[[0, 1, 2]]]
    assert [output.tolist() for output in second.future.result(0)] == [[[3, 4, 5], [6, 7, 8]]]


def test_an_error_is_the_futures_exception_and_no_other_requests():
    source = source_of()
    good, bad = source.place(request(2), 0), source.place(request(2), 0)
    bad.error = ModelError("row is bad")
    source.finish([good, bad])
    assert bad.future.exception(0) is bad.error
    assert good.future.exception(0) is None


@pytest.mark.parametrize("error", [None, ModelError("row is bad")], ids=["answered", "failed"])
def test_a_request_that_has_ended_has_given_back_its_rows_before_its_caller_hears_of_it(error):
    source = source_of()
    ticket = source.place(request(ROWS), 0)
    ticket.error = error
    free = []
    ticket.future.add_done_callback(lambda future: free.append(source.place(request(ROWS), 0)))
    source.finish([ticket])
    assert [again.first_row for again in free] == [0]


def test_a_ticket_that_nobody_took_over_can_be_given_back():
    source = source_of()
    source.give_back(source.place(request(ROWS), 0))
    assert source.place(request(ROWS), 0).first_row == 0


@pytest.mark.parametrize(
    ("placed", "rows", "words"),
    [
        (3, 2, r"no room for 2 rows within 0.01 s \(1 of 4 rows are free\); .*raise queue_rows"),
        (0, 5, r"no room for 5 rows within 0.01 s \(4 of 4 rows are free\)"),
    ],
    ids=["too few are free", "more than there are"],
)
def test_who_finds_no_room_in_time_is_told_and_takes_nothing(placed, rows, words):
    source = source_of()
    if placed:
        source.place(request(placed), 0)
    with pytest.raises(QueueFull, match=words):
        source.place(request(rows), 0.01)
    assert source.place(request(ROWS - placed), 0).first_row == placed


@pytest.mark.parametrize("timeout_s", [None, WAIT_S], ids=["for ever", "for a time"])
def test_a_caller_waits_until_enough_rows_are_free(timeout_s):
    source = source_of()
    tickets = [source.place(request(1), 0) for _ in range(ROWS)]
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(source.place, request(2, 7), timeout_s)
        wait_until_waiting(source)
        answer(source, tickets[0], 1)
        answer(source, tickets[2], 1)  # two are free, but not side by side
        wait_until_waiting(source)
        assert not waiting.done()
        answer(source, tickets[1], 1)
        ticket = waiting.result(WAIT_S)
    assert {ticket.first_row, ticket.first_row + 1} <= {0, 1, 2}
    assert source.table.inputs[0][ticket.first_row : ticket.first_row + 2].tolist() == [[7, 7], [7, 7]]


def test_rows_that_are_too_few_for_one_caller_go_to_another_that_they_suffice():
    source = source_of()
    tickets = [source.place(request(2), 0) for _ in range(2)]
    with ThreadPoolExecutor(2) as callers:
        large = callers.submit(source.place, request(ROWS), None)
        wait_until_waiting(source, 1)
        small = callers.submit(source.place, request(1), None)
        wait_until_waiting(source, 2)
        try:
            answer(source, tickets[0], 1)
            ticket = small.result(WAIT_S)
            assert not large.done()
        finally:
            source.give_back(tickets[1])
        source.give_back(ticket)
        assert large.result(WAIT_S).rows == ROWS


def test_many_callers_share_few_rows_and_each_gets_its_own_answer():
    source, owners, lock = source_of(), {}, threading.Lock()

    def call(seed):
        for number in range(60):
            rows = (seed * 7 + number * number) % ROWS + 1
            ticket = source.place(request(rows), WAIT_S)
            own = range(ticket.first_row, ticket.first_row + rows)
            with lock:
                assert not owners.keys() & set(own)
                owners.update(dict.fromkeys(own, seed))
            with lock:
                for row in own:
                    del owners[row]
            answer(source, ticket, seed * 1000 + number)
            assert ticket.future.result(0)[0].unique().tolist() == [seed * 1000 + number]
        return seed

    with ThreadPoolExecutor(6) as callers:
        assert list(callers.map(call, range(6), timeout=WAIT_S)) == list(range(6))
    assert source.place(request(ROWS), 0).first_row == 0


def test_closing_turns_away_whoever_waits_and_whoever_comes():
    device = Device()
    source = source_of(device=device)
    ticket = source.place(request(ROWS), 0)
    with ThreadPoolExecutor(2) as callers:
        waiting = [callers.submit(source.place, request(rows), None) for rows in (1, 2)]
        wait_until_waiting(source, 2)
        source.close()
        for each in waiting:
            assert isinstance(each.exception(WAIT_S), EngineStopped)
    source.give_back(ticket)
    with pytest.raises(EngineStopped, match="the engine was stopped while a request waited for room"):
        source.place(request(1), 0)
    assert device.forgotten == 1


def test_the_device_is_told_of_the_whole_memory_once():
    device = Device()
    source = source_of(device=device)
    (memory,) = device.registered
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    assert begin % PAGE == 0
    for tensor in (*source.table.inputs, *source.table.outputs):
        assert begin <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end
    assert device.forgotten == 0


def test_a_request_that_cannot_be_copied_keeps_no_rows():
    source = source_of()
    with pytest.raises(InvalidRequest):
        source.place([torch.ones(ROWS, 7), torch.ones(ROWS)], 0)
    source.place(request(ROWS), 0)
