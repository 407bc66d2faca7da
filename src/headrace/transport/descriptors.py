"""A ring of descriptors in shared memory: one process writes, one reads, and is woken if it sleeps.

Writer and reader each own one counter, so nothing is locked between processes. A reader with nothing to read
says that it sleeps, looks once more, and waits on an eventfd, which the writer signals only then. Between
"write, then look whether the reader sleeps" and "say that I sleep, then look for work" both sides need a full
memory fence, or both could look too early; taking and releasing a lock is one (an atomic read-modify-write).
The order of the other writes is x86's own (stores are seen in order); on a machine with a weaker order this
needs fences that Python does not offer, so `require_ordered_memory` refuses it.

Descriptors are moved as bytes, many at once where many are there: `pack` and `unpack` for a few, DESCRIPTOR_DTYPE for
many.
"""

from __future__ import annotations

import os
import platform
import select
import struct
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from mmap import mmap
from typing import NamedTuple

import numpy as np

from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    HeadraceError,
    InvalidRequest,
    ModelError,
    PeerGone,
    TransportFailed,
)
from headrace.transport.layout import COUNTERS, DESCRIPTOR, LINE

ORDERED_MACHINES = ("x86_64", "AMD64")
_BODY = struct.Struct("<q6i4q")
DESCRIPTOR_DTYPE = np.dtype(
    [
        ("request", np.int64),
        ("kind", np.int32),
        ("first_row", np.int32),
        ("rows", np.int32),
        ("lane", np.int32),
        ("batch_rows", np.int32),
        ("entry", np.int32),
        ("received_ns", np.int64),
        ("started_ns", np.int64),
        ("computed_ns", np.int64),
        ("responded_ns", np.int64),
    ]
)
_WRITTEN, _READ, _ASLEEP = (line * LINE // 8 for line in range(3))  # counters, as indexes of 8-byte words

_KIND_SHIFT = 28  # an error's `entry`: the row whose text it is, and above these bits its kind

REQUEST, ANSWER, ERROR, CLOSE, CANCEL = range(5)


class ErrorKind(IntEnum):
    """Which remedy an error calls for."""

    MODEL = 0  # what the model, or anything unforeseen, raised
    DEADLINE = 1
    CANCELLED = 2
    STOPPED = 3
    INVALID = 4

    @property
    def error_class(self) -> type[HeadraceError]:
        """The class that stands for it, with what a server answers."""
        return _ERRORS[self]


_ERRORS: dict[ErrorKind, type[HeadraceError]] = {
    ErrorKind.MODEL: ModelError,
    ErrorKind.DEADLINE: DeadlineExceeded,
    ErrorKind.CANCELLED: Cancelled,
    ErrorKind.STOPPED: EngineStopped,
    ErrorKind.INVALID: InvalidRequest,
}


def kind_of(error: Exception) -> ErrorKind:
    return next((kind for kind, known in _ERRORS.items() if isinstance(error, known)), ErrorKind.MODEL)


class Descriptor(NamedTuple):
    """What is said of one request or answer; its data lie in the table's rows.

    Times are the backend's, and a request has none yet: there two fields mean something else, see `request`.
    """

    request: int  # its index, the client's own
    kind: int  # REQUEST, ANSWER, ERROR, CLOSE or CANCEL
    first_row: int = 0
    rows: int = 0
    lane: int = 0  # of a request: its priority
    batch_rows: int = 0  # of the batch that it was computed in
    entry: int = 0  # of an error: where its text is, and its kind
    received_ns: int = 0  # of a request: its deadline
    started_ns: int = 0
    computed_ns: int = 0
    responded_ns: int = 0

    @property
    def priority(self) -> int:
        """A request's; 0 for the default."""
        return self.lane

    @property
    def deadline_ns(self) -> int:
        """A request's; 0 for none."""
        return self.received_ns

    @property
    def error_kind(self) -> ErrorKind:
        """An error's."""
        return ErrorKind(self.entry >> _KIND_SHIFT)


def pack(descriptor: Descriptor) -> bytes:
    return _BODY.pack(*descriptor)


def unpack(data: bytes) -> Iterator[Descriptor]:
    return map(Descriptor._make, _BODY.iter_unpack(data))


def unpack_requests(data: bytes) -> Iterator[tuple[int, ...]]:
    """Yield fields in a descriptor's order, for the side that has many requests to take and little time."""
    return _BODY.iter_unpack(data)


def request(number: int, first_row: int, rows: int, deadline_ns: int = 0, priority: int = 0) -> bytes:
    """Return a request's descriptor.

    `deadline_ns` is a reading of `clock.now_ns`, the one clock of all processes of a host: a request that has not been
    launched by then is not computed; 0: whenever there is room. `priority` is 1 for the highest, larger for lower, and
    0 for `request.DEFAULT_PRIORITY`.
    """
    return _BODY.pack(number, REQUEST, first_row, rows, priority, 0, 0, deadline_ns, 0, 0, 0)


def cancellation(number: int, first_row: int, rows: int) -> bytes:
    """Return the word that a request is no longer wanted: it ends as CANCELLED if it has not been launched yet.

    It ends exactly once all the same, so wait for the answer. Send it once for a request at most, and not after its
    answer has been taken: the ring has room for no more.
    """
    return _BODY.pack(number, CANCEL, first_row, rows, 0, 0, 0, 0, 0, 0, 0)


def error_entry(kind: ErrorKind, row: int) -> int:
    """Return the `entry` of an error whose text is a row's."""
    return kind << _KIND_SHIFT | row


def text_row(entry: int) -> int:
    """Return whose row's text an error's `entry` names."""
    return entry & (1 << _KIND_SHIFT) - 1


def require_ordered_memory(machine: str | None = None) -> None:
    """Raise TransportFailed where the processor may reorder stores."""
    machine = machine or platform.machine()
    if machine not in ORDERED_MACHINES:
        raise TransportFailed(
            f"the ring needs a processor that keeps stores in order ({ORDERED_MACHINES[0]}), and this is {machine};"
            " use --transport queue"
        )


class DescriptorRing:
    """One direction. Several threads of the writing process may `put`; one of the reading process may `take`.

    `find_peer` returns a descriptor that becomes readable when the other side's process has ended, or None while that
    process is not known.
    """

    def __init__(
        self,
        memory: mmap,
        offset: int,
        entries: int,
        wake_fd: int,
        find_peer: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._begin = offset + COUNTERS
        self._entries = entries
        self._wake_fd = wake_fd
        self._find_peer = find_peer
        self._lock = threading.Lock()
        # Words of a memoryview are stored and loaded whole. struct's explicit byte orders go byte by byte: another
        # process then reads half a counter (seen: a descriptor read twice at the 256th).
        self._counters = memoryview(memory)[offset : offset + COUNTERS].cast("Q")
        self._bodies = memoryview(memory)[self._begin : self._begin + entries * DESCRIPTOR]

    def put(self, data: bytes) -> None:
        """Append whole descriptors and wake a sleeping reader. Raises TransportFailed if they do not fit."""
        with self._lock:
            written = self._counters[_WRITTEN]
            count = len(data) // DESCRIPTOR
            if written + count - self._counters[_READ] > self._entries:
                raise TransportFailed(f"the ring is full: {self._entries} descriptors wait to be read")
            self._copy_in(written % self._entries, data)
            self._counters[_WRITTEN] = written + count
        # Releasing the lock was the fence.
        if self._counters[_ASLEEP]:
            os.eventfd_write(self._wake_fd, 1)

    def take(self, timeout_s: float, most: int = 1 << 16) -> bytes:
        """Return all descriptors that wait, at most `most`; none after `timeout_s` without one.

        Raises PeerGone if there are none and the writing process has ended.
        """
        if not self.has_work() and not self._wait(timeout_s):
            return b""
        read = self._counters[_READ]
        count = min(self._counters[_WRITTEN] - read, most)
        data = self._copy_out(read % self._entries, count)
        self._counters[_READ] = read + count
        return data

    def _copy_in(self, at: int, data: bytes) -> None:
        room = (self._entries - at) * DESCRIPTOR
        begin = at * DESCRIPTOR
        self._bodies[begin : begin + len(data[:room])] = data[:room]
        if len(data) > room:
            self._bodies[: len(data) - room] = data[room:]

    def _copy_out(self, at: int, count: int) -> bytes:
        first = min(count, self._entries - at)
        data = bytes(self._bodies[at * DESCRIPTOR : (at + first) * DESCRIPTOR])
        return data if first == count else data + bytes(self._bodies[: (count - first) * DESCRIPTOR])

    def has_work(self) -> bool:
        """Tell whether `take` would return something at once. Cheap enough to be asked all the time."""
        return self._counters[_READ] != self._counters[_WRITTEN]

    def _wait(self, timeout_s: float) -> bool:
        """Sleep until there is work or the time is over; return whether there is some.

        A wake-up may come late, for work that the reader has found by itself, and then there is none.
        """
        deadline_ns = now_ns() + int(timeout_s * NS_PER_S)
        while not self._sleep(max(0.0, seconds(deadline_ns - now_ns()))):
            if now_ns() >= deadline_ns:
                return False
        return True

    def arm(self) -> bool:
        """Say that the reader sleeps; return whether it may: False if there is work. `disarm` when it is awake."""
        self._counters[_ASLEEP] = 1
        with self._lock:  # the fence
            pass
        return not self.has_work()

    def disarm(self) -> None:
        self._counters[_ASLEEP] = 0
        _drain(self._wake_fd)

    def _sleep(self, timeout_s: float) -> bool:
        gone = False
        if self.arm():
            peer = self._find_peer()
            ready, _, _ = select.select([self._wake_fd, *([] if peer is None else [peer])], [], [], timeout_s)
            gone = peer in ready
        self.disarm()
        if self.has_work():
            return True
        if gone:
            raise PeerGone("the process at the other end of the ring has ended; start it and connect again")
        return False


def _drain(eventfd: int) -> None:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return
