"""The processes that the tests kill: a client of a ring that does what it is told, and an engine that ends itself."""

import os
import signal

import numpy as np

from headrace.transport import descriptors
from headrace.transport.descriptors import ANSWER, DescriptorRing, request, unpack
from headrace.transport.ring import RingClient, RingEndpoint
from tests.backend.fakes import FEATURES, WAIT_S, Backend, Lanes


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Client:
    """Each method is one order; requests' rows hold their number, and answers must hold its double."""

    def __init__(self, pair):
        self.ring = RingClient(pair)
        self._rows = {}

    def lease(self, number, rows):
        first = self.ring.lease(rows)
        assert first is not None
        inputs = np.full((rows, FEATURES), number, np.float32)
        self.ring.input_bytes(0, first, rows)[:] = inputs.tobytes()
        self._rows[number] = rows
        return first

    def send(self, number, rows):
        self.ring.send(request(number, self.lease(number, rows), rows))

    def die_while_writing(self, number, rows):
        """Be killed when the descriptor is in the ring, and the counter does not say so yet."""
        requests = self.ring._mapped.requests
        copy_in = requests._copy_in
        requests._copy_in = lambda at, data: (copy_in(at, data), die())
        self.send(number, rows)

    def die_before_waking(self, number, rows):
        """Be killed when the counter says that there is a request, and the reader has not been woken."""
        descriptors.os.eventfd_write = die
        self.send(number, rows)
        die()  # the reader did not sleep

    def await_answer(self):
        while not self.ring.ready():
            pass

    def finish(self):
        """Read all answers, which must be right, and close."""
        while self._rows:
            data = self.ring.take(WAIT_S)
            assert data, "no answer came"
            for told in unpack(data):
                assert told.kind == ANSWER, self.ring.error_text(told.entry)
                outputs = np.frombuffer(self.ring.output_bytes(0, told.first_row, told.rows), np.float32)
                assert told.rows == self._rows.pop(told.request)
                assert (outputs == 2 * told.request).all()
                self.ring.release(told.first_row, told.rows)
        self.ring.close()


def obey(pair, orders):
    """Be a client. An order is a method's name and its arguments; each is confirmed."""
    client = Client(pair)
    orders.send(None)
    while (order := orders.recv()) is not None:
        name, *arguments = order
        getattr(client, name)(*arguments)
        orders.send(None)


def dies_after(method):
    """Return the method, after which its process is no more."""
    return lambda *args: (method(*args), die())


HOOKS = {
    "taken, before it is launched": lambda backend: setattr(backend.dispatcher, "submit_or_tell", die),
    "launched": lambda _: setattr(Lanes, "launch", dies_after(Lanes.launch)),
    "computed, before it is answered": lambda _: setattr(RingEndpoint, "finish", die),
    "while an answer is written": lambda _: setattr(DescriptorRing, "_copy_in", dies_after(DescriptorRing._copy_in)),
    "answered": lambda _: setattr(RingEndpoint, "finish", dies_after(RingEndpoint.finish)),
}
BEFORE_TAKING = "before it takes anything"


def serve_until(stage, pairs, orders):
    """Be a backend that is killed at this stage of the first request."""
    backend = Backend(lanes=1, spin=False)
    for pair in pairs:
        backend.attach(pair)
    backend.arrivals.wait_until(lambda: backend.registered == len(pairs))
    if stage == BEFORE_TAKING:
        backend.arrivals.stop()
    else:
        HOOKS[stage](backend)
    orders.send(None)
    signal.pause()
