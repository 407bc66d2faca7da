"""How late a process wakes for a plan of 500 moments a second: `python benchmarks/pacing.py`.

`select` on an epoll counts microseconds, `epoll_wait` milliseconds. "slack" is the kernel's timer slack (prctl(2)), 50
us unless it is set. What is left before a moment is spun, polling the sockets.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import time

import numpy as np

GAP_NS = 2_000_000
COUNT = 1_500
PR_SET_TIMERSLACK = 29


def lateness_us(epoll: select.epoll, way: str, spin_us: int) -> tuple[np.ndarray, float]:
    """Return how late each wake was, and the share of a core that waiting took."""
    begin = time.perf_counter_ns() + GAP_NS
    late = np.empty(COUNT)
    cpu_s = time.process_time()
    for number in range(COUNT):
        due = begin + number * GAP_NS
        while (left := due - time.perf_counter_ns()) > 0:
            sleep_s = (left - spin_us * 1000) / 1e9
            if sleep_s <= 0:
                epoll.poll(0)
            elif way == "select":
                select.select([epoll], [], [], sleep_s)
            else:
                epoll.poll(int(sleep_s * 1000) / 1000)
        late[number] = (time.perf_counter_ns() - due) / 1000
    return late, (time.process_time() - cpu_s) / (COUNT * GAP_NS / 1e9)


def main() -> None:
    one, other = socket.socketpair()
    epoll = select.epoll()
    epoll.register(one, select.EPOLLIN)
    sys.stdout.write(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs\n")
    for way, spin_us, slack_ns in (
        ("select", 0, 50_000),
        ("select", 0, 1),
        ("select", 50, 1),
        ("select", 100, 1),
        ("select", 200, 1),
        ("epoll_wait", 1000, 1),
    ):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(slack_ns), 0, 0, 0)
        late, share = lateness_us(epoll, way, spin_us)
        p50, p90, p99 = np.percentile(late, [50, 90, 99])
        sys.stdout.write(
            f"{way:10} spins {spin_us:4} us, slack {slack_ns:6} ns: late by {p50:.1f} / {p90:.1f} / {p99:.1f} us"
            f" (p50, p90, p99), {share:.0%} of a core\n"
        )
    one.close()
    other.close()


if __name__ == "__main__":
    main()
