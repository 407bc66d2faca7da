"""A ring of descriptors in shared memory: one process writes, one reads, and is woken if it sleeps.

Writer and reader each own one counter, so nothing is locked between processes. A reader with nothing to read
says that it sleeps, looks once more, and waits on an eventfd, which the writer signals only then. Between
"write, then look whether the reader sleeps" and "say that I sleep, then look for work" both sides need a full
memory fence, or both could look too early; taking and releasing a lock is one (an atomic read-modify-write).
The order of the other writes is x86's own (stores are seen in order); on a machine with a weaker order this
needs fences that Python does not offer, so `create` refuses it.
"""

from __future__ import annotations

import os
import platform
import select
import struct
import threading
from dataclasses import dataclass
from mmap import mmap

from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.errors import TransportFailed
from headrace.transport.layout import COUNTERS, DESCRIPTOR, LINE

ORDERED_MACHINES = ("x86_64", "AMD64")
MAX_DIMENSIONS = 6
_BODY = struct.Struct(f"<q5i4x{MAX_DIMENSIONS}q4q")
_WRITTEN, _READ, _ASLEEP = (line * LINE // 8 for line in range(3))  # counters, as indexes of 8-byte words


@dataclass(slots=True)
class Descriptor:
    """What is said of one request or answer; its data lie in the slot."""

    index: int  # of the request, the client's own
    kind: int  # REQUEST, ANSWER, ERROR or CLOSE
    slot: int = -1
    dtype: int = 0  # code of the element type
    shape: tuple[int, ...] = ()
    worker: int = 0
    times_ns: tuple[int, int, int, int] = (0, 0, 0, 0)


REQUEST, ANSWER, ERROR, CLOSE = range(4)


def require_ordered_memory(machine: str | None = None) -> None:
    """Raise TransportFailed where the processor may reorder stores."""
    machine = machine or platform.machine()
    if machine not in ORDERED_MACHINES:
        raise TransportFailed(
            f"the ring needs a processor that keeps stores in order ({ORDERED_MACHINES[0]}), and this is {machine};"
            " use --transport queue"
        )


class DescriptorRing:
    """One direction. Several threads of the writing process may `put`; one of the reading process may `take`."""

    def __init__(self, memory: mmap, offset: int, entries: int, wake_fd: int) -> None:
        self._memory = memory
        self._offset = offset
        self._entries = entries
        self._wake_fd = wake_fd
        self._lock = threading.Lock()
        # Words of a memoryview are stored and loaded whole. struct's explicit byte orders go byte by byte: another
        # process then reads half a counter (seen: a descriptor read twice at the 256th).
        self._counters = memoryview(memory)[offset : offset + COUNTERS].cast("Q")

    def put(self, descriptor: Descriptor) -> None:
        """Append a descriptor and wake a sleeping reader. Raises TransportFailed if the ring is full."""
        with self._lock:
            written = self._get(_WRITTEN)
            if written - self._get(_READ) >= self._entries:
                raise TransportFailed(f"the ring is full: {self._entries} descriptors wait to be read")
            _pack(self._memory, self._entry(written), descriptor)
            self._set(_WRITTEN, written + 1)
        # Releasing the lock was the fence.
        if self._get(_ASLEEP):
            os.eventfd_write(self._wake_fd, 1)

    def take(self, timeout_s: float) -> Descriptor | None:
        """Return the next descriptor, or None after `timeout_s` without one."""
        if not self._has_work() and not self._wait(timeout_s):
            return None
        read = self._get(_READ)
        descriptor = _unpack(self._memory, self._entry(read))
        self._set(_READ, read + 1)
        return descriptor

    def _has_work(self) -> bool:
        return self._get(_READ) != self._get(_WRITTEN)

    def _wait(self, timeout_s: float) -> bool:
        """Sleep until there is work or the time is over; return whether there is some.

        A wake-up may come late, for work that the reader has found by itself, and then there is none.
        """
        deadline_ns = now_ns() + int(timeout_s * NS_PER_S)
        while not self._sleep(max(0.0, seconds(deadline_ns - now_ns()))):
            if now_ns() >= deadline_ns:
                return False
        return True

    def _sleep(self, timeout_s: float) -> bool:
        self._set(_ASLEEP, 1)
        with self._lock:  # the fence
            pass
        if not self._has_work():
            select.select([self._wake_fd], [], [], timeout_s)
        self._set(_ASLEEP, 0)
        _drain(self._wake_fd)
        return self._has_work()

    def _entry(self, number: int) -> int:
        return self._offset + COUNTERS + number % self._entries * DESCRIPTOR

    def _get(self, counter: int) -> int:
        return self._counters[counter]

    def _set(self, counter: int, value: int) -> None:
        self._counters[counter] = value


def _pack(memory: mmap, at: int, what: Descriptor) -> None:
    padding = (0,) * (MAX_DIMENSIONS - len(what.shape))
    head = (what.index, what.kind, what.slot, what.dtype, len(what.shape), what.worker)
    _BODY.pack_into(memory, at, *head, *what.shape, *padding, *what.times_ns)


def _unpack(memory: mmap, at: int) -> Descriptor:
    index, kind, slot, dtype, dimensions, worker, *rest = _BODY.unpack_from(memory, at)
    shape, times = rest[:dimensions], rest[MAX_DIMENSIONS:]
    return Descriptor(index, kind, slot, dtype, tuple(shape), worker, (times[0], times[1], times[2], times[3]))


def _drain(eventfd: int) -> None:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return
