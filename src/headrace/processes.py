"""How our processes behave towards each other."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from headrace.errors import HeadraceError, RunFailed

_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29  # prctl(2)
_PATH = re.compile(r"(?<![\w.:/])/[^\s'\":,()]+")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@dataclass(frozen=True, slots=True)
class Ready:
    """A child has finished preparing and waits for the word to go."""

    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """A child cannot go on; its error is the run's."""

    error: HeadraceError


def become_child() -> None:
    """Leave Ctrl-C to the supervisor, and die with the process that started this one, however it dies.

    Call first in a child's target. Without the second half, a killed supervisor would leave a server behind that
    holds the GPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the parent died before prctl took effect
            os._exit(1)


@contextmanager
def children_deaf_to_ctrl_c() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started within; ours waits until the end of the block.

    A terminal sends it to children too, and until one reaches `become_child` it would end in a traceback.
    """
    resource_tracker.ensure_running()  # started within, it would let the signal through again (Python 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_freed_memory() -> None:
    """Have glibc use large blocks again rather than give them back to the system each time (mallopt(3)).

    A body of 750 KB in fresh memory costs more for its page faults than for its bytes. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_TOP_PAD, 16 << 20)):
            mallopt(parameter, value)


def exact_sleep() -> None:
    """Let this thread's sleeps end within microseconds instead of the kernel's 50. See prctl(2), PR_SET_TIMERSLACK."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def allow_open_files() -> None:
    """Let this process open as many files as the system lets it; the usual limit is 1024, for old uses of select(2).

    Each connection is a file: without this a frontend would meet the limit before its own, and keep clients waiting
    where it should refuse them.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def describe(error: BaseException) -> str:
    """Return an error's type and first line, for a message to a user who has no traceback."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def without_paths(text: str) -> str:
    """Return a message as clients may read it: what it says of our file system is left out."""
    return _PATH.sub("(path)", text)


@contextmanager
def failures_reported(report: Connection, what: str) -> Iterator[None]:
    """Tell the supervisor of whatever ends the block; of what is not the user's to read, that `what`, and why."""
    try:
        yield
    except HeadraceError as error:
        report.send(ChildFailed(error))
    except Exception as error:  # noqa: BLE001  the supervisor ends with it, or tells it
        report.send(ChildFailed(RunFailed(f"{what}: {describe(error)}")))


def enter(target: str, job: object) -> None:
    """Call "module:function" with `job`: what a child does first, so that only it imports the module."""
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(job)
