"""Lanes, sources and arrivals that do what they are told, and remember what was asked of them."""

import threading

import pytest

from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.request import Ticket, Withdrawal

WAIT_S = 60
SINGLES = BatchingConfig(buckets=(1,))
BATCHING = BatchingConfig(buckets=(1, 2, 4))


def indexes_of(batches):
    return [[ticket.index for ticket in batch.tickets] for batch in batches]


def says(text, *indexes):
    """What a lane says of a batch with one of these requests in it."""
    return lambda batch: ValueError(text) if {ticket.index for ticket in batch.tickets} & {*indexes} else None


class FakeSource:
    """Remembers what it was told, and by how many calls."""

    def __init__(self):
        self.table = object()
        self.calls: list[list[Ticket]] = []
        self._changed = threading.Condition()

    def finish(self, tickets):
        with self._changed:
            self.calls.append(list(tickets))
            self._changed.notify_all()

    @property
    def told(self):
        """The tickets that have ended, in order."""
        return [ticket for call in self.calls for ticket in call]

    def wait_until_told(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= count, WAIT_S), f"{len(self.told)} were told"

    def ticket(self, index, rows=1, received_ns=0):
        """A request whose rows lie beside no other's."""
        return Ticket(self, index, 1000 * index, rows, received_ns)


class FakeLane:
    """Ends its batches, in order, when it is told to; from the start on if `free`.

    `launch_error` and `wait_error` say of a batch what goes wrong with it, if anything.
    """

    def __init__(self, *, free=False, launch_error=lambda batch: None, wait_error=lambda batch: None):
        self.launched = []  # batches whose launch has been tried, in order
        self._allowed = float("inf") if free else 0
        self._accepted = 0
        self._waited = 0
        self._launch_error = launch_error
        self._wait_error = wait_error
        self._changed = threading.Condition()

    @property
    def outstanding(self):
        """How many batches it has that nobody has waited for yet."""
        return self._accepted - self._waited

    def launch(self, batch):
        with self._changed:
            self.launched.append(batch)
            self._changed.notify_all()
        error = self._launch_error(batch)
        if error is not None:
            raise error
        batch.token = self._accepted
        self._accepted += 1

    def done(self, batch):
        return batch.token < self._allowed

    def wait(self, batch):
        with self._changed:
            assert self._changed.wait_for(lambda: self.done(batch), WAIT_S), "never ended"
        self._waited += 1
        error = self._wait_error(batch)
        if error is not None:
            raise error

    def end(self, count=1):
        """End so many batches more."""
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def free(self):
        """From now on, end every batch at once."""
        self.end(float("inf"))

    def wait_until_launched(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.launched) >= count, WAIT_S), f"{len(self.launched)} were"


class FakeClock:
    """Stands still until it is set."""

    def __init__(self):
        self.now_ns = 0
        self._calls = 0
        self._changed = threading.Condition()

    def __call__(self):
        with self._changed:
            self._calls += 1
            self._changed.notify_all()
            return self.now_ns

    def set_and_wait_until_seen(self, now_ns, times=3):
        """Set it, and return when it has been looked at so many times."""
        with self._changed:
            self.now_ns = now_ns
            seen = self._calls + times
            assert self._changed.wait_for(lambda: self._calls >= seen, WAIT_S), "nobody looks at the clock"


class FakeArrivals:
    """Requests for the loop, put by any thread."""

    def __init__(self):
        self._waiting: list[list[Ticket] | list[Withdrawal] | None] = []
        self._withdrawn: list[Withdrawal] = []
        self._closed = False
        self._turns = 0
        self._changed = threading.Condition()

    def put(self, tickets):
        """Have these taken, or, if they are withdrawals, learnt after what was put before."""
        with self._changed:
            self._waiting.append(tickets)
            self._changed.notify_all()

    def ready(self):
        with self._changed:
            self._turns += 1
            self._changed.notify_all()
            return bool(self._waiting)

    def take(self, timeout_s):
        with self._changed:
            self._turns += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting, timeout_s)
            tickets = self._waiting.pop(0) if self._waiting and not self._closed else []
            self._closed |= tickets is None
            if tickets and isinstance(tickets[0], Withdrawal):
                tickets, self._withdrawn = [], tickets
            return None if self._closed else tickets

    def withdrawn(self):
        with self._changed:
            withdrawn, self._withdrawn = self._withdrawn, []
            return withdrawn

    def wait_for_turns(self, count=3):
        """Return when the loop has gone round so many times."""
        with self._changed:
            wanted = self._turns + count
            assert self._changed.wait_for(lambda: self._turns >= wanted, WAIT_S), "the loop stands still"


class OnThreads:
    """A dispatcher that was started: callers launch, and a thread answers."""

    def __init__(self, lanes, batching, depth, **options):
        self.dispatcher = Dispatcher(lanes, batching, depth, **options)
        self.dispatcher.start()
        self.submit = self.dispatcher.submit
        self.withdraw = self.dispatcher.withdraw
        self.stop = self.dispatcher.stop

    def settle(self):
        """Return when nothing more will be launched by itself."""


class InALoop:
    """A dispatcher that serves arrivals in a loop on one thread."""

    def __init__(self, lanes, batching, depth, **options):
        self.dispatcher = Dispatcher(lanes, batching, depth, **options)
        self.arrivals = FakeArrivals()
        self.submit = self.arrivals.put
        self.withdraw = self.arrivals.put
        self._loop = threading.Thread(target=self.dispatcher.serve, args=(self.arrivals,), daemon=True)
        self._loop.start()

    def settle(self):
        """Return when the loop has gone round with everything that was put."""
        self.arrivals.wait_for_turns()

    def stop(self):
        self.arrivals.put(None)
        self._loop.join(WAIT_S)
        assert not self._loop.is_alive()


BOTH_WAYS = pytest.mark.parametrize("way", [OnThreads, InALoop], ids=["on threads", "in a loop"])
