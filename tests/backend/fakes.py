"""A backend whose lanes, arrivals and supervisor's pipe are in the test's hands, over real rings."""

import os
import threading
import time
from collections import deque

from headrace.backend.arrivals import RingsArrivals
from headrace.clock import NS_PER_S, now_ns
from headrace.control import Attach
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout

WAIT_S = 60
FEATURES = 3
TABLE_ROWS = 12
BUCKETS = (1, 2, 4)
POKE_S = 0.02  # between two wake-ups of a loop that has something to notice


def layout_of(rows=TABLE_ROWS):
    spec = TensorSpec(name="tensor", dtype="float32", features=(FEATURES,))
    return Layout(rows=rows, inputs=(spec,), outputs=(spec,))


def wake_descriptor():
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Control:
    """The supervisor's pipe: words that are put are heard; an exception that is put is raised."""

    def __init__(self):
        self._words = deque()
        self._fd = wake_descriptor()

    def put(self, word):
        self._words.append(word)
        os.eventfd_write(self._fd, 1)

    def poll(self):
        return bool(self._words)

    def recv(self):
        word = self._words.popleft()
        if not self._words:
            os.eventfd_read(self._fd)
        if isinstance(word, Exception):
            raise word
        return word

    def fileno(self):
        return self._fd

    def close(self):
        os.close(self._fd)


class Lanes:
    """Lanes that double what they get: at once, or, of what was launched while they were held, when they are let go.

    A batch with one of the `bad` numbers fails.
    """

    def __init__(self):
        self.bad = set()
        self.launched = []  # the numbers of all requests, in order
        self._held = False
        self._changed = threading.Condition()

    def hold(self):
        with self._changed:
            self._held = True

    def let_go(self):
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def launch(self, batch):
        with self._changed:
            batch.token = not self._held
            self.launched += [ticket.index for ticket in batch.tickets]
            self._changed.notify_all()

    def done(self, batch):
        return batch.token or not self._held

    def wait(self, batch):
        with self._changed:
            assert self._changed.wait_for(lambda: self.done(batch), WAIT_S), "never let go"
        if bad := self.bad & {ticket.index for ticket in batch.tickets}:
            raise ValueError(f"bad: {bad}")
        for segment, _ in batch.pieces():
            segment.table.outputs[0][segment.slice] = 2 * segment.table.inputs[0][segment.slice]

    def wait_until_launched(self, numbers):
        with self._changed:
            assert self._changed.wait_for(lambda: set(numbers) <= set(self.launched), WAIT_S), self.launched


class WatchedArrivals:
    """The real arrivals, which the test can stop before they take, and whose turns it can wait for."""

    def __init__(self, arrivals, wake_fd):
        self._arrivals = arrivals
        self._wake_fd = wake_fd
        self._changed = threading.Condition()
        self._open = True
        self._waits = False
        self._learnt = [0, 0]  # requests taken and clients buried by the turns before this one, so all is in effect
        self.turns = self.taken = self.buried = 0

    def ready(self):
        time.sleep(0)  # lets the test have the interpreter's lock, which a spinning loop gives up far too seldom
        return self._arrivals.ready()

    def take(self, timeout_s):
        with self._changed:
            self.turns += 1
            self.taken, self.buried = self._learnt
            self._waits = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open, WAIT_S), "never opened"
            self._waits = False
        tickets = self._arrivals.take(timeout_s)
        self._learnt[0] += len(tickets or ())
        return tickets

    def withdrawn(self):
        words = self._arrivals.withdrawn()
        self._learnt[1] += sum(word.request is None for word in words)
        return words

    def stop(self):
        """Return when nothing is being taken, nor will be."""
        self._open = False
        self.wait_until(lambda: self._waits)

    def go_on(self):
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def wait_for_turns(self, count=2):
        wanted = self.turns + count
        self.wait_until(lambda: self.turns >= wanted)

    def wait_until(self, condition):
        end_ns = now_ns() + WAIT_S * NS_PER_S
        with self._changed:
            while not condition():
                assert now_ns() < end_ns, "it never happened"
                os.eventfd_write(self._wake_fd, 1)
                self._changed.wait(POKE_S)


class Backend:
    """Serves rings on a thread of its own: in a spinning loop, or with threads that sleep."""

    def __init__(self, *, lanes, spin):
        self.wake_fd = wake_descriptor()
        self.control = Control()
        self.lanes = Lanes()
        self.registered = 0  # rings whose memory a device knows
        self._arrivals = RingsArrivals(self.control, self.wake_fd, self._register)
        self.arrivals = WatchedArrivals(self._arrivals, self.wake_fd)
        self.dispatcher = Dispatcher([self.lanes] * lanes, BatchingConfig(buckets=BUCKETS), 1)
        self._thread = threading.Thread(target=self.dispatcher.answer, args=(self.arrivals,), kwargs={"spin": spin})
        self._thread.start()

    def _register(self, memory):
        self.registered += 1

        def undo():
            self.registered -= 1

        return undo

    def attach(self, pair):
        self.control.put(Attach(pair))

    def free_lanes(self):
        return len(self.dispatcher._levels[0])

    def end(self, word):
        """Say the last word, wait for the end, and let go of all that is left."""
        self.control.put(word)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._arrivals.close()
        self.control.close()
        os.close(self.wake_fd)
