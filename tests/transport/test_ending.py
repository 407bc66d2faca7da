"""The early word of a process's end: it comes with every end and with nothing else, and before the end is over."""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from headrace.transport.ending import Watch, make_page

WAIT_S = 60
SOON_S = 0.1  # what is not told by then is taken as not told
GIB = 1 << 30
_log = logging.getLogger(__name__)


class Dying:
    """A process of `tests.transport.dying`, and who watches it."""

    def __init__(self, what="live", size=0, watches=1):
        page_fd = make_page()
        self.watches = [Watch(page_fd) for _ in range(watches)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transport.dying", str(page_fd), what, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(page_fd,),
        )
        os.close(page_fd)
        self.ended_fd = os.pidfd_open(self.process.pid)
        assert self.process.stdout.readline() == b"done\n"

    @property
    def ending_fd(self):
        return self.watches[0].fd

    def go_on(self):
        """Let it do what it does last, and end by itself if that does not end it."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def close(self):
        self.process.kill()
        self.process.wait(WAIT_S)
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self.ended_fd)
        for watch in self.watches:
            watch.close()


@contextmanager
def dying(*args, **kwargs):
    process = Dying(*args, **kwargs)
    try:
        yield process
    finally:
        process.close()


def is_told(descriptor, timeout_s=WAIT_S):
    return bool(select.select([descriptor], [], [], timeout_s)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV])
def test_a_signal_that_ends_the_process_is_told(number):
    with dying() as process:
        assert not is_told(process.ending_fd, 0)
        process.process.send_signal(number)
        assert is_told(process.ending_fd)
        assert process.process.wait(WAIT_S) == -number


@pytest.mark.parametrize(
    ("what", "code"), [("live", 0), ("exit at once", 3), ("raise", 1)], ids=["returns", "exits at once", "raises"]
)
def test_a_process_that_ends_by_itself_is_told(what, code):
    with dying(what) as process:
        assert not is_told(process.ending_fd, 0)
        process.go_on()
        assert is_told(process.ending_fd)
        assert process.process.wait(WAIT_S) == code


def test_a_program_that_takes_the_processs_place_is_its_end():
    with dying("be replaced") as process:
        process.go_on()
        assert is_told(process.ending_fd)
        assert process.process.poll() is None


@pytest.mark.parametrize("what", ["fork", "leave a child", "end a thread"])
def test_neither_children_nor_other_threads_are_taken_for_the_process(what):
    with dying(what) as process:
        assert not is_told(process.ending_fd, SOON_S)
        process.process.kill()
        assert is_told(process.ending_fd)


def test_a_stopped_process_is_not_dead_and_goes_on_to_be_watched():
    with dying() as process:
        process.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.process.pid, os.WSTOPPED)
        assert not is_told(process.ending_fd, SOON_S)
        process.process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.process.pid, os.WCONTINUED)
        assert not is_told(process.ending_fd, SOON_S)
        process.process.kill()
        assert is_told(process.ending_fd)


def test_a_process_that_is_killed_while_it_is_stopped_is_told():
    with dying() as process:
        process.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.process.pid, os.WSTOPPED)
        process.process.kill()
        assert is_told(process.ending_fd)


def test_all_who_watch_a_process_are_told():
    with dying(watches=3) as process:
        process.process.kill()
        assert all(is_told(watch.fd) for watch in process.watches)


def test_of_several_processes_only_the_dead_is_told():
    with ExitStack() as stack:
        processes = [stack.enter_context(dying()) for _ in range(3)]
        processes[1].process.kill()
        assert is_told(processes[1].ending_fd)
        assert not is_told(processes[0].ending_fd, SOON_S)
        assert not is_told(processes[2].ending_fd, 0)


def test_one_who_comes_when_the_process_is_dead_is_told():
    page_fd = make_page()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.transport.dying", str(page_fd), "live", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(page_fd,),
    )
    process.communicate(b"\n", WAIT_S)
    watch = Watch(page_fd)
    os.close(page_fd)
    assert is_told(watch.fd)
    watch.close()


def test_where_no_word_comes_closing_tells_whoever_shares_the_descriptor():
    with dying("say nothing") as process:
        shared = os.dup(process.ending_fd)
        process.process.kill()
        assert is_told(process.ended_fd)
        assert not is_told(shared, SOON_S)
    assert is_told(shared)
    os.close(shared)


def test_what_was_told_cannot_be_taken_from_others_who_share_the_descriptor():
    with dying() as process:
        shared = os.dup(process.ending_fd)
        process.process.kill()
        assert is_told(process.ending_fd)
        assert os.read(shared, 1) == b""
        assert is_told(process.ending_fd)
        os.close(shared)


def test_who_watches_leaves_no_thread_and_no_descriptor():
    before = set(os.listdir("/proc/self/fd")), set(threading.enumerate())  # noqa: PTH208
    for _ in range(3):
        page_fd = make_page()
        watch = Watch(page_fd)
        os.close(page_fd)
        assert len(threading.enumerate()) == len(before[1]) + 1
        watch.close()
    assert (set(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before  # noqa: PTH208


def test_signals_are_left_to_threads_that_wait_for_them():
    page_fd = make_page()
    threads = set(os.listdir("/proc/self/task"))  # noqa: PTH208
    watch = Watch(page_fd)
    (thread,) = set(os.listdir("/proc/self/task")) - threads  # noqa: PTH208
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    watch.close()
    os.close(page_fd)


def test_the_word_comes_before_the_process_has_given_back_its_memory():
    with dying(size=2 * GIB) as process:
        killed_s = time.monotonic()
        process.process.kill()
        assert is_told(process.ending_fd)
        told_s = time.monotonic() - killed_s
        was_over = is_told(process.ended_fd, 0)
        assert is_told(process.ended_fd)
        ended_s = time.monotonic() - killed_s
    _log.info("killed with 2 GiB: told after %.1f ms, ended after %.1f ms", told_s * 1000, ended_s * 1000)
    assert not was_over
    assert told_s < ended_s / 2
