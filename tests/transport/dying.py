"""A process that tells of its own end, and ends in many ways: `python -m tests.transport.dying PAGE_FD WHAT BYTES`.

It says a word when it has done what it was to do first, and goes on when it is answered.
"""

import os
import sys
import threading
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

from headrace.transport.ending import tell_of_own_end

SMALL_PAGE = 4096


def memory_of(size):
    """Return memory in small pages, all of them touched, so that it takes the system long to have it back."""
    memory = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_NOHUGEPAGE)
    memory[::SMALL_PAGE] = bytes(size // SMALL_PAGE)
    return memory


def fork(does):
    child = os.fork()
    if child == 0:
        does()
        os._exit(0)
    return child


def outlive():
    """Stay until the other end of what this process reads is closed, and say nothing."""
    os.close(sys.stdout.fileno())
    sys.stdin.read()


def end_a_thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


FIRST = {
    "fork": lambda: os.waitpid(fork(int), 0),
    "leave a child": lambda: fork(outlive),
    "end a thread": end_a_thread,
}
LAST = {
    "be replaced": lambda: os.execv("/bin/cat", ["cat"]),  # noqa: S606  it is what is tried
    "exit at once": lambda: os._exit(3),
    "raise": lambda: int("no number"),
}


def live(page_fd, what, size):
    memory = memory_of(size) if size else None
    if what != "say nothing":
        tell_of_own_end(page_fd)
    FIRST.get(what, int)()
    os.write(sys.stdout.fileno(), b"done\n")
    sys.stdin.readline()
    LAST.get(what, int)()
    return memory


if __name__ == "__main__":
    live(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
