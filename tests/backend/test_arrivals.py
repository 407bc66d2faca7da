"""Requests of several rings as one stream: clients come, go and are heard of while others keep the backend busy."""

import os

import pytest

from headrace.backend.arrivals import LISTEN_EVERY, RingsArrivals
from headrace.control import Attach, Stop
from headrace.errors import InvalidRequest
from headrace.transport.descriptors import ErrorKind, cancellation, request, unpack
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient
from tests.backend.fakes import BUCKETS, WAIT_S, Backend, Control, layout_of, wake_descriptor


class Rings:
    """Arrivals with clients in this process, and what the device has been told of their memory."""

    def __init__(self):
        self.control, self.wake_fd = Control(), wake_descriptor()
        self.registered = 0
        self.arrivals = RingsArrivals(self.control, self.wake_fd, self._register)

    def _register(self, memory):
        self.registered += 1

        def undo():
            self.registered -= 1

        return undo

    def attach(self):
        pair = RingPair.create(layout_of(), self.wake_fd)
        client = RingClient(pair)
        self.control.put(Attach(pair))
        self.arrivals.take(0)
        return client

    def close(self):
        self.arrivals.close()
        self.control.close()
        os.close(self.wake_fd)


@pytest.fixture
def rings():
    rings = Rings()
    yield rings
    rings.close()
    assert rings.registered == 0


def indexes_of(tickets):
    return [ticket.index for ticket in tickets]


def test_requests_of_all_rings_are_taken_together_and_go_back_each_to_its_own(rings):
    first, second = rings.attach(), rings.attach()
    first.send(request(1, 0, 1) + request(2, 1, 1))
    second.send(request(1, 0, 2))
    taken = rings.arrivals.take(0)
    assert indexes_of(taken) == [1, 2, 1]
    for ticket in taken:
        ticket.source.finish([ticket])
    assert [told.rows for told in unpack(first.take(0))] == [1, 1]
    assert [told.rows for told in unpack(second.take(0))] == [2]


def test_a_request_wakes_who_waits(rings):
    client = rings.attach()
    client.send(request(1, 0, 1))
    assert indexes_of(rings.arrivals.take(WAIT_S)) == [1]


def test_a_cancellation_is_handed_on(rings):
    client = rings.attach()
    client.send(request(1, 0, 1))
    (ticket,) = rings.arrivals.take(0)
    client.send(cancellation(1, 0, 1))
    assert rings.arrivals.ready()
    assert rings.arrivals.take(0) == []
    assert rings.arrivals.withdrawn() == [(ticket.source, (1, 0))]
    assert rings.arrivals.withdrawn() == ()
    ticket.source.finish([ticket])


def test_a_ring_that_its_client_has_closed_is_let_go_when_all_has_been_answered(rings):
    client = rings.attach()
    client.send(request(1, 0, 1))
    client.close()
    (ticket,) = rings.arrivals.take(0)
    rings.arrivals.take(0)
    assert rings.registered == 1
    ticket.source.finish([ticket])
    assert len(client.take(0)) > 0, "the client still gets its answer"
    rings.arrivals.take(0)
    assert rings.registered == 0


def test_words_are_heard_though_there_is_always_something_to_take(rings):
    client = rings.attach()
    rings.control.put(Stop())
    looks = 0
    while rings.control.poll():
        client.send(request(1, 0, 1))
        assert rings.arrivals.ready()
        (ticket,) = rings.arrivals.take(0)
        ticket.source.finish([ticket])
        client.take(0)
        looks += 1
        assert looks <= LISTEN_EVERY
    assert rings.arrivals.take(0) is None


@pytest.mark.parametrize("end", [Stop(), EOFError(), OSError()], ids=["told to stop", "left alone", "broken"])
def test_it_ends_with_the_supervisor_after_what_has_been_sent(rings, end):
    client = rings.attach()
    rings.control.put(end)
    client.send(request(1, 0, 1))
    (ticket,) = rings.arrivals.take(0)
    assert rings.arrivals.take(WAIT_S) is None
    ticket.source.finish([ticket])


def test_a_request_of_more_rows_than_a_batch_is_refused_and_others_are_answered():
    backend = Backend(lanes=1, spin=False)
    pair = RingPair.create(layout_of(), backend.wake_fd)
    client = RingClient(pair)
    client.send(request(1, 0, BUCKETS[-1] + 1) + request(2, BUCKETS[-1] + 1, 1))
    backend.attach(pair)
    told = {}
    while len(told) < 2:
        told |= {each.request: each for each in unpack(client.take(WAIT_S))}
    assert told[1].error_kind is ErrorKind.INVALID
    assert InvalidRequest.__name__ in client.error_text(told[1].entry)
    assert told[2].batch_rows == 1
    backend.end(Stop())
