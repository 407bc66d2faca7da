"""Senders over a real ring within one process, and over a queue that is a list: what was sent, and what comes back."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.senders import CopyingSender, InPlaceSender, JoinedSender, QueueSender
from headrace.request import Response, Ticket, Timeline
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint

ROWS = 2  # of a request
PLACES = 3  # requests that the ring holds
OVER_A_RING = pytest.mark.parametrize("kind", [CopyingSender, InPlaceSender], ids=["copied", "in place"])


def batches_of(count):
    """Batch number n holds 10 n in its first row and 10 n + 1 in its second."""
    return [torch.tensor([[10.0 * number] * 3, [10.0 * number + 1] * 3]) for number in range(count)]


class Backend:
    """Takes requests, and answers or fails those that it is told to, in whatever order."""

    def __init__(self, pair):
        self.endpoint = RingEndpoint(pair, lambda memory: lambda: None)
        self.waiting = {}

    def take(self):
        for told in self.endpoint.take(0) or []:
            assert told.index not in self.waiting
            self.waiting[told.index] = told

    def rows_in_flight(self):
        return [row for told in self.waiting.values() for row in range(told.first_row, told.first_row + told.rows)]

    def inputs(self, index):
        told = self.waiting[index]
        return self.endpoint.table.inputs[0][told.first_row : told.first_row + told.rows]

    def answer(self, *indexes, failed=()):
        """Answer with twice the inputs."""
        tickets = []
        for index in indexes:
            told = self.waiting[index]
            rows = slice(told.first_row, told.first_row + told.rows)
            self.endpoint.table.outputs[0][rows] = 2 * self.inputs(index)[:, :1]
            error = ValueError(f"request {index} is bad\nsecond line") if index in failed else None
            tickets.append(Ticket(self.endpoint, index, told.first_row, told.rows, 1, 2, 3, 4, 5, error=error))
            del self.waiting[index]
        self.endpoint.finish(tickets)


class Ring:
    """Both ends of a ring with a sender of `kind`, as a context."""

    def __init__(self, kind, batches=2, rows=ROWS * PLACES):
        spec = {"dtype": "float32"}
        self.pair = RingPair.create(
            Layout(
                rows=rows,
                inputs=(TensorSpec(name="input", features=(3,), **spec),),
                outputs=(TensorSpec(name="output", features=(1,), **spec),),
            )
        )
        self.batches = batches_of(batches)
        self.client = RingClient(self.pair)
        self.sender = kind(self.client, self.batches)
        self.backend = Backend(self.pair)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.pair.close()

    def send(self, indexes):
        """Send as many as there is room for, as the generator does."""
        sent = []
        while indexes:
            numbers = self.sender.send(indexes)
            if not numbers:
                break
            sent += numbers
            indexes = indexes[len(numbers) :]
        self.backend.take()
        return sent


# A step sends so many more requests, or answers some of those in flight, chosen and ordered by the numbers.
STEPS = st.lists(st.integers(1, PLACES + 2) | st.lists(st.integers(0, 100), min_size=1, max_size=PLACES), max_size=30)


@OVER_A_RING
@given(steps=STEPS, batches=st.integers(1, 4))
def test_rows_are_never_in_flight_twice_and_hold_the_batch_that_was_named(kind, steps, batches):
    with Ring(kind, batches) as ring:
        next_index, named = 0, {}
        for step in steps:
            if isinstance(step, int):
                room = PLACES - len(ring.backend.waiting)
                numbers = ring.send(range(next_index, next_index + step))
                assert len(numbers) == min(step, room)
                named.update(enumerate(numbers, next_index))
                next_index += len(numbers)
            elif ring.backend.waiting:
                waiting = sorted(ring.backend.waiting)
                chosen = list(dict.fromkeys(waiting[number % len(waiting)] for number in step))
                ring.backend.answer(*chosen)
                received = ring.sender.receive(0)
                assert received.descriptors["request"].tolist() == chosen
                expected = [2 * ring.batches[named.pop(index)][:, :1].numpy() for index in chosen]
                np.testing.assert_array_equal(received.outputs, expected)
            rows = ring.backend.rows_in_flight()
            assert len(rows) == len(set(rows))
            for index in ring.backend.waiting:
                assert ring.backend.inputs(index).equal(ring.batches[named[index]])


def test_data_that_are_in_place_are_not_written_again():
    with Ring(InPlaceSender, batches=2) as ring:
        before = ring.client.table.inputs[0].clone()
        assert before.equal(torch.cat([ring.batches[0], ring.batches[1], ring.batches[0]]))
        for batch in ring.batches:
            batch.fill_(99)
        assert ring.send(range(3)) == [0, 1, 0]
        ring.backend.answer(2, 1, 0)
        ring.sender.receive(0)
        assert ring.send(range(3, 6)) == [0, 1, 0]
        assert ring.client.table.inputs[0].equal(before)


def test_the_place_that_has_waited_longest_is_used_first():
    with Ring(InPlaceSender) as ring:
        ring.send(range(3))
        ring.backend.answer(1)
        ring.backend.answer(2, 0)
        ring.sender.receive(0)
        ring.send(range(3, 6))
        assert [ring.backend.waiting[index].first_row for index in (3, 4, 5)] == [2, 4, 0]


def test_many_in_place_requests_are_handed_over_at_once():
    with Ring(InPlaceSender) as ring:
        assert ring.sender.send([7, 8, 9, 10]) == [0, 1, 0]
        ring.backend.take()
        assert sorted(ring.backend.waiting) == [7, 8, 9]
        assert ring.sender.send([10]) == []
        assert ring.backend.endpoint.take(0) == []


def test_rows_that_make_no_whole_request_are_left_alone():
    with Ring(InPlaceSender, rows=ROWS * PLACES + 1) as ring:
        assert len(ring.send(range(PLACES + 1))) == PLACES


@OVER_A_RING
def test_answers_stay_whole_when_their_rows_are_used_again(kind):
    with Ring(kind, batches=1) as ring:
        ring.send([0, 1])
        ring.backend.answer(0, 1)
        received = ring.sender.receive(0)
        before = received.outputs.copy()
        ring.client.table.outputs[0].fill_(-1)
        np.testing.assert_array_equal(received.outputs, before)


@OVER_A_RING
def test_outputs_are_those_of_the_answers_that_are_no_errors_in_order(kind):
    with Ring(kind, batches=3) as ring:
        ring.send(range(3))
        ring.backend.answer(2, 1, 0, failed=(1,))
        received = ring.sender.receive(0)
        assert received.descriptors["request"].tolist() == [2, 1, 0]
        assert received.failed.tolist() == [False, True, False]
        assert received.outputs[:, :, 0].tolist() == [[40, 42], [0, 2]]
        assert received.first_error == "ValueError: request 1 is bad"
        assert len(ring.send(range(3, 6))) == PLACES, "failed requests give their rows back too"


@OVER_A_RING
def test_the_first_of_several_errors_is_told(kind):
    with Ring(kind) as ring:
        ring.send(range(2))
        ring.backend.answer(1, 0, failed=(0, 1))
        received = ring.sender.receive(0)
        assert received.failed.all()
        assert len(received.outputs) == 0
        assert received.first_error == "ValueError: request 1 is bad"


@OVER_A_RING
def test_what_the_backend_says_of_a_request_is_kept(kind):
    with Ring(kind) as ring:
        ring.send([5])
        ring.backend.answer(5)
        (told,) = ring.sender.receive(0).descriptors
        assert [told[name] for name in ("received_ns", "started_ns", "computed_ns", "lane", "batch_rows")] == [
            1,
            2,
            3,
            4,
            5,
        ]
        assert told["responded_ns"] > 0


@OVER_A_RING
def test_without_an_answer_nothing_is_received(kind):
    with Ring(kind) as ring:
        ring.send([0])
        assert ring.sender.receive(0) is None


@OVER_A_RING
def test_closing_tells_the_backend_that_no_request_will_follow(kind):
    with Ring(kind) as ring:
        ring.sender.send([0])
        ring.sender.close()
        assert [told.index for told in ring.backend.endpoint.take(0)] == [0]
        assert ring.backend.endpoint.take(0) is None


class ListClient:
    """A queue's client that keeps what is sent, and has its answers made by the test."""

    def __init__(self):
        self.sent = []
        self.responses = []
        self.closed = False

    def send(self, index, batch):
        self.sent.append((index, batch))

    def receive(self, timeout_s):
        return self.responses.pop(0) if self.responses else None

    def close(self):
        self.closed = True


def test_over_a_queue_requests_go_one_at_a_time_and_batches_repeat_in_turn():
    client, batches = ListClient(), batches_of(3)
    sender = QueueSender(client, batches)
    assert [sender.send(list(range(begin, 6))) for begin in range(2, 6)] == [(2,), (0,), (1,), (2,)]
    assert [index for index, _ in client.sent] == [2, 3, 4, 5]
    assert all(batch is batches[index % 3] for index, batch in client.sent)
    sender.close()
    assert client.closed


def test_an_answer_of_a_queue_reads_like_one_of_a_ring():
    client = ListClient()
    sender = QueueSender(client, batches_of(1))
    client.responses += [
        Response(7, Timeline(1, 2, 3, 4, worker=2), output=torch.ones(2, 5)),
        Response(8, Timeline(), error="ValueError: bad"),
    ]
    answer, error = sender.receive(0), sender.receive(0)
    told = answer.descriptors[0]
    assert (told["request"], told["lane"], told["batch_rows"]) == (7, 2, 2)
    assert [told[f"{stage}_ns"] for stage in ("received", "started", "computed", "responded")] == [1, 2, 3, 4]
    assert (answer.outputs.shape, answer.failed.tolist(), answer.first_error) == ((1, 2, 5), [False], None)
    assert (error.outputs, error.failed.tolist(), error.first_error) == (None, [True], "ValueError: bad")
    assert sender.receive(0) is None


LANES = 4  # of each engine
BOTH = range(2)


class Engines:
    """Two rings and the sender that joins them, as a context."""

    def __init__(self, kind):
        self._stack = ExitStack()
        self._kind = kind

    def __enter__(self):
        self.rings = [self._stack.enter_context(Ring(self._kind)) for _ in BOTH]
        self.sender = JoinedSender([ring.sender for ring in self.rings], ROWS, ROWS, LANES, skip=0)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def held(self, engine):
        backend = self.rings[engine].backend
        backend.take()
        return sorted(backend.waiting)


@OVER_A_RING
def test_requests_are_spread_over_engines_as_long_as_any_has_room(kind):
    with Engines(kind) as engines:
        sent = sum(len(engines.sender.send([index])) for index in range(2 * PLACES))
        assert sent == 2 * PLACES
        assert not engines.sender.send([99])
        assert [len(engines.held(engine)) for engine in BOTH] == [PLACES, PLACES]
        assert sorted(engines.held(0) + engines.held(1)) == list(range(2 * PLACES))


def test_several_requests_are_sent_in_order_until_there_is_no_room():
    with Engines(InPlaceSender) as engines:
        assert len(engines.sender.send(list(range(10)))) == 2 * PLACES
        assert sorted(engines.held(0) + engines.held(1)) == list(range(2 * PLACES))


@OVER_A_RING
def test_answers_come_from_all_engines_with_their_lanes_numbered_through(kind):
    with Engines(kind) as engines:
        batches = {index: engines.sender.send([index])[0] for index in range(4)}
        lanes = {}
        for engine in (1, 0):
            engines.rings[engine].backend.answer(*engines.held(engine))
        while len(lanes) < 4:
            received = engines.sender.receive(30)
            for descriptor, output in zip(received.descriptors, received.outputs, strict=True):
                index = int(descriptor["request"])
                lanes[index] = int(descriptor["lane"])
                assert output[:, 0].tolist() == [20.0 * batches[index], 20.0 * batches[index] + 2]
        first, second = sorted(set(lanes.values()))
        assert second == first + LANES, "the same lane of each"
        assert list(lanes.values()).count(first) == 2
        assert engines.sender.receive(0) is None


def test_an_answer_wakes_whoever_waits_for_any_engine():
    with Engines(CopyingSender) as engines, ThreadPoolExecutor(1) as pool:
        engines.sender.send([0])
        engines.sender.send([1])
        for index in (1, 0):
            waiting = pool.submit(engines.sender.receive, 30)
            engine = next(engine for engine in BOTH if index in engines.held(engine))
            engines.rings[engine].backend.answer(index)
            assert waiting.result(30).descriptors["request"].tolist() == [index]


def test_the_engine_that_answers_sooner_gets_the_next_request():
    with Engines(CopyingSender) as engines:
        engines.sender.send([0])
        engines.sender.send([1])
        quick = next(engine for engine in BOTH if engines.held(engine) == [0])
        for index in range(2, 12):
            engines.rings[quick].backend.answer(*engines.held(quick))
            engines.sender.receive(30)
            engines.sender.send([index])
            assert index in engines.held(quick), "it has fewer under way"


def test_a_failed_request_is_told_by_whichever_engine_had_it():
    with Engines(CopyingSender) as engines:
        engines.sender.send([0])
        engine = next(engine for engine in BOTH if engines.held(engine))
        engines.rings[engine].backend.answer(0, failed=(0,))
        received = engines.sender.receive(30)
        assert received.failed.tolist() == [True]
        assert "request 0 is bad" in received.first_error
