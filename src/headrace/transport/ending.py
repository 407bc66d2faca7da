"""Tells of a process's end when it begins, not when it is over: by a word in shared memory that the kernel marks.

A killed process becomes a zombie, and its pidfd readable, only when all that it had has been given back, which takes
as long as there is memory, pinned memory and a GPU's context to give back. In Linux each of its threads goes through
`do_exit` (kernel/exit.c), and in it through

    exit_mm        exit_mm_release  the thread's robust futexes are marked, and who waits for them is woken
                   mmput            by the last thread: all memory is unmapped, unpinned and freed
    exit_files     by the last thread: sockets and pipes are closed, drivers let go of their devices
    exit_notify    the parent is told, the pidfd becomes readable; by the last thread

so a robust futex tells before anything slow has begun. The thread that holds it here sleeps and does nothing else: a
fatal signal wakes it at once, while others may still be in a driver's call that no signal interrupts. A process that is
stopped (SIGSTOP) goes on holding it; a child that is forked has no robust list, and neither ends nor prolongs it; a
program that takes the process's place (execve) ends it. What a process writes as its core comes first.

It is an early word and no more: other threads may still run, and the process's memory and GPU are not free yet. Where
it does not come (no such list, a list that was overwritten), the pidfd tells as ever.

Sources: set_robust_list(2), futex(2); Linux, Documentation/locking/robust-futexes.rst and robust-futex-ABI.rst,
`exit_mm_release` in kernel/fork.c, `handle_futex_death` in kernel/futex/core.c, `coredump_task_exit` in kernel/exit.c.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

_FUTEX, _SET_ROBUST_LIST = 202, 273  # numbers of system calls on x86-64, the only machine that rings run on
_WAIT, _WAKE = 0, 1  # between processes: without FUTEX_PRIVATE_FLAG
_WAITERS, _OWNER_DIED = 0x8000_0000, 0x4000_0000  # linux/futex.h; the rest of the word is the thread that holds it
_ALL = 2**31 - 1

_libc = ctypes.CDLL(None)
_libc.syscall.restype = ctypes.c_long


class _Head(ctypes.Structure):
    """`struct robust_list_head`."""

    _fields_: ClassVar = [
        ("first", ctypes.c_void_p),
        ("futex_offset", ctypes.c_long),  # from an entry to its word
        ("pending", ctypes.c_void_p),
    ]


class _Page(ctypes.Structure):
    """What lies in the shared memory: one word, and the list that leads to it.

    The list is the holder's own, and is here because the kernel may take the private memory of a process that has used
    too much before its threads have ended (oom_kill.c), but not what it shares.
    """

    _fields_: ClassVar = [("head", _Head), ("entry", ctypes.c_void_p), ("word", ctypes.c_uint32)]


def make_page() -> int:
    """Return shared memory for the word of one process, as a descriptor: for `tell_of_own_end` there and `Watch` here.

    Whoever has it can make the holder seem dead, so it is for processes that trust each other.
    """
    page_fd = os.memfd_create("headrace-ending", os.MFD_CLOEXEC)
    os.ftruncate(page_fd, mmap.PAGESIZE)
    return page_fd


def tell_of_own_end(page_fd: int) -> None:
    """Have this process's end told from now on. For good: a thread holds the word as long as the process lives."""
    held = threading.Event()
    with _no_signals():
        threading.Thread(target=_hold, args=(_mapped(page_fd), held), name="ending", daemon=True).start()
    held.wait()


class Watch:
    """`fd` becomes readable when the process that `tell_of_own_end`s begins to end. A thread waits, and costs nothing.

    Several may watch the same page.
    """

    def __init__(self, page_fd: int) -> None:
        self._page = _mapped(page_fd)
        # Closed rather than written to: whoever shares the reading end cannot take that from the others.
        self.fd, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._wait, name="ending-watch", daemon=True)
        with _no_signals():
            self._thread.start()

    def close(self) -> None:
        """The process must have ended, and this is told to all who watch it."""
        self._page.word = _OWNER_DIED
        _futex(self._page, _WAKE, _ALL)
        self._thread.join()
        os.close(self.fd)
        del self._page  # with it the mapping ends, which has a descriptor of its own

    def _wait(self) -> None:
        while not (word := self._page.word) & _OWNER_DIED:
            _futex(self._page, _WAIT, word)
        os.close(self._writer)
        _futex(self._page, _WAKE, _ALL)  # the kernel has woken one


def _mapped(page_fd: int) -> _Page:
    return _Page.from_buffer(mmap.mmap(page_fd, mmap.PAGESIZE))


def _hold(page: _Page, held: threading.Event) -> None:
    """Hold the word until the process ends.

    The list that glibc gives to every thread is replaced: it is for robust mutexes, and this thread locks none.
    """
    begin = ctypes.addressof(page)
    page.entry = begin  # the last entry leads back to the head
    page.head = _Head(begin + _Page.entry.offset, _Page.word.offset - _Page.entry.offset, None)
    length = ctypes.c_size_t(ctypes.sizeof(_Head))
    if _libc.syscall(ctypes.c_long(_SET_ROBUST_LIST), ctypes.c_void_p(begin), length) == 0:
        page.word = threading.get_native_id() | _WAITERS  # or the kernel would wake nobody
        _futex(page, _WAKE, _ALL)
    held.set()
    while True:
        signal.pause()  # a stopped process that goes on wakes it


def _futex(page: _Page, operation: int, value: int) -> None:
    """Wait as long as the word has this value, or wake so many. Why it returned is seen from the word."""
    word = ctypes.c_void_p(ctypes.addressof(page) + _Page.word.offset)
    _libc.syscall(ctypes.c_long(_FUTEX), word, ctypes.c_int(operation), ctypes.c_uint32(value), None)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Have threads that are started within leave all signals to others, which wait for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
