"""What lies between a client and a backend: two queues, or a ring's memory. No torch: the supervisor makes them."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Protocol, cast

import psutil

from headrace.errors import TransportFailed
from headrace.transport.layout import Layout

if TYPE_CHECKING:
    import multiprocessing as mp

    from torch import Tensor

    from headrace.request import Response


@dataclass(frozen=True, slots=True)
class QueuePair:
    """Made by the supervisor, handed to both sides. None on `requests` ends the run."""

    requests: mp.Queue[tuple[int, Tensor] | None]
    responses: mp.Queue[Response]


@dataclass(slots=True)
class RingPair:
    """A ring's memory and the two eventfds that wake its readers.

    Whoever unpickles it, as a child process does, gets descriptors of its own. `close` lets go of them; the memory
    ends with the last process that holds it, however that process ends.

    `peer_fd` becomes readable when whoever is at the other end has gone: for sides that share no process numbers, or
    must not trust what the other one says of itself. Without it a side watches the process that the other one names.
    `ending_fd`, where there is one as well, becomes readable as soon as that process begins to end (`ending.Watch`).
    """

    layout: Layout
    memory_fd: int
    wake_backend_fd: int
    wake_client_fd: int
    peer_fd: int | None = None
    ending_fd: int | None = None

    @classmethod
    def create(cls, layout: Layout, wake_backend_fd: int | None = None) -> RingPair:
        """Make the memory, all of it at once, so that it cannot run out while it is used. Raises TransportFailed.

        Rings of one backend may share the eventfd that wakes it: each gets a duplicate of `wake_backend_fd`.
        """
        available = psutil.virtual_memory().available
        if layout.total_bytes > available:  # the kernel would rather take all memory than say so
            raise TransportFailed(_too_large(layout, f"{available / 1e6:.0f} MB are free"))
        memory_fd = os.memfd_create("headrace-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(memory_fd, 0, layout.total_bytes)
        except OSError as error:
            os.close(memory_fd)
            raise TransportFailed(_too_large(layout, error.strerror or "refused")) from error
        # A peer that could shrink the file would turn our next access into a crash.
        fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        wake = os.eventfd(0, flags) if wake_backend_fd is None else os.dup(wake_backend_fd)
        return cls(layout, memory_fd, wake, os.eventfd(0, flags))

    def close(self) -> None:
        for descriptor in self._descriptors():
            os.close(descriptor)

    def _descriptors(self) -> tuple[int, ...]:
        always = (self.memory_fd, self.wake_backend_fd, self.wake_client_fd)
        return (*always, *(each for each in (self.peer_fd, self.ending_fd) if each is not None))

    def __getstate__(self) -> tuple[Layout, tuple[_Detachable, ...]]:
        return self.layout, tuple(cast("_Detachable", DupFd(descriptor)) for descriptor in self._descriptors())

    def __setstate__(self, state: tuple[Layout, tuple[_Detachable, ...]]) -> None:
        self.layout, descriptors = state
        self.memory_fd, self.wake_backend_fd, self.wake_client_fd, *peer = (each.detach() for each in descriptors)
        self.peer_fd, self.ending_fd = (*peer, None, None)[:2]


class DupFdHolder:
    """A file descriptor that a child process gets as a descriptor of its own."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> _Detachable:
        return cast("_Detachable", DupFd(self.fd))

    def __setstate__(self, state: _Detachable) -> None:
        self.fd = state.detach()


def _too_large(layout: Layout, reason: str) -> str:
    return (
        f"a ring of {layout.rows} rows needs {layout.total_bytes / 1e6:.0f} MB of shared memory ({reason});"
        " lower --ring-slots or --batch-size"
    )


class _Detachable(Protocol):
    """What multiprocessing sends in place of a file descriptor."""

    def detach(self) -> int: ...
