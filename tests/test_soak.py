"""Good, bad, slow and vanishing clients, all at once, against a real server: nobody suffers, and nothing stays behind.

Some seconds by default; HEADRACE_SOAK_S says how many, HEADRACE_SOAK_SEED which clients do what.
"""

import logging
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from tests.serving import WAIT_S, Server
from tests.soak_clients import (
    BAD,
    BODY_TIMEOUT_S,
    GATE_ID,
    GOOD,
    HEADER_TIMEOUT_S,
    KILLED,
    MAX_BODY_BYTES,
    MODEL,
    SLOW,
    VANISHING,
    Inputs,
    Visitor,
    binary_request,
    check_binary,
    connect,
    read_answer,
)

SOAK_S = float(os.environ.get("HEADRACE_SOAK_S", "5"))
SEED = int(os.environ.get("HEADRACE_SOAK_SEED", "0"))
GROUPS = (GOOD, BAD, SLOW, VANISHING, KILLED)
CROWD = [GOOD] * 4 + [BAD] * 2 + [SLOW] * 2 + [VANISHING] * 2 + [KILLED]  # a thread each
SETTLED = 0.4  # of the time: by then buffers and caches have the size that this load gives them
MOST_GROWTH_BYTES = 8 << 20  # of a process, from then to the end
UNDER_WAY = 12  # requests that the server is told to stop with
OPTIONS = (
    *("--frontends", "2", "--queue-rows", "128", "--system-shared-memory", "--num-workers", "1"),
    *("--max-body-bytes", str(MAX_BODY_BYTES), "--header-timeout", str(HEADER_TIMEOUT_S)),
    *("--body-timeout", str(BODY_TIMEOUT_S)),
)
_log = logging.getLogger(__name__)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path, *OPTIONS, model=MODEL)
    server.drain()
    yield server
    if server.process.poll() is None:
        server.process.kill()


def processes_of(server):
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def metrics(server):
    """Return the sum of each metric's samples, and of failures by reason."""
    sums = Counter()
    for line in server.call("/metrics")[2].decode().splitlines():
        if not line.startswith("#"):
            labelled, _, value = line.rpartition(" ")
            sums[labelled.partition("{")[0]] += float(value)
            if 'reason="' in labelled:
                sums[labelled.partition("{")[0], labelled.partition('reason="')[2].partition('"')[0]] += float(value)
    return sums


def until(reached, what):
    limit = time.monotonic() + WAIT_S
    while not (found := reached())[0]:
        assert time.monotonic() < limit, f"{what}: {found[1]}"


def nothing_held(server):
    sums = metrics(server)
    held, free, rows = (sums[f"headrace_{name}"] for name in ("requests_in_flight", "ring_rows_free", "ring_rows"))
    return held == 0 and free == rows > 0, f"{held:.0f} requests under way, {free:.0f} of {rows:.0f} rows free"


def descriptors(processes):
    return {process.pid: process.num_fds() for process in processes}


def descriptors_are_back(processes, before):
    now = descriptors(processes)
    return all(now[pid] <= before[pid] for pid in before), f"{before} before, {now} now"


class Memory:
    """What each process has for itself, in bytes, over time; what it shares, as rings, is no leak of it."""

    def __init__(self, processes):
        self._processes = processes
        self._at_s: list[float] = []
        self._bytes: list[list[int]] = []

    def look(self):
        self._at_s.append(time.monotonic())
        self._bytes.append([process.memory_full_info().uss for process in self._processes])

    def growth(self):
        """Return by how much each process grows from the first look to the last, along the line that fits best."""
        at_s = np.asarray(self._at_s)
        slopes = np.polyfit(at_s - at_s[0], np.asarray(self._bytes, float), 1)[0]
        return (slopes * (at_s[-1] - at_s[0])).round().astype(int).tolist()


class Crowd:
    """Threads that do one act after the other, each kind of act as often as the others of its group."""

    def __init__(self, server):
        self._server = server
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.done = Counter()

    def visit(self, number, acts, rounds=None):
        """Go through all acts in random order, again and again until told to stop, or so many times."""
        chosen = random.Random(f"{SEED} {number}")  # noqa: S311
        visitor = Visitor(self._server, number, chosen)
        try:
            while rounds is None or rounds > 0:
                for act in chosen.sample(acts, len(acts)):
                    if self._stop.is_set():
                        return
                    try:
                        getattr(visitor, act)()
                    except BaseException as error:
                        self._stop.set()
                        raise AssertionError(f"{act} of visitor {number}, seed {SEED}: {error!r}") from error
                    with self._lock:
                        self.done[act] += 1
                rounds = None if rounds is None else rounds - 1
        finally:
            visitor.close()

    def soak(self, memory):
        """Let all of them in until the time is over."""
        began_s = time.monotonic()
        with ThreadPoolExecutor(len(CROWD)) as pool:
            futures = [pool.submit(self.visit, number, acts) for number, acts in enumerate(CROWD)]
            while time.monotonic() < began_s + SOAK_S and not self._stop.wait(SOAK_S / 40):
                if time.monotonic() > began_s + SETTLED * SOAK_S:
                    memory.look()
            self._stop.set()
        for future in futures:
            future.result()


def ask(server, seed, ids=None):
    inputs = Inputs(random.Random(seed), rows=1)  # noqa: S311
    if ids is not None:
        inputs.ids[:] = ids
    with connect(server) as connection:
        connection.sendall(binary_request(inputs))
        check_binary(inputs, read_answer(connection))


def under_way(server):
    """Return how many requests both frontends have, as of a quarter of a second ago at most."""
    return int(metrics(server)["headrace_requests_in_flight"])


@pytest.mark.timeout(180 + 2 * SOAK_S)
def test_good_clients_are_served_rightly_among_bad_slow_and_vanishing_ones_and_nothing_stays_behind(server):
    processes = processes_of(server)
    first = Crowd(server)
    with ThreadPoolExecutor(len(GROUPS)) as pool:  # what is opened or imported once is there by then
        for future in [pool.submit(first.visit, number, acts, rounds=1) for number, acts in enumerate(GROUPS)]:
            future.result()
    until(lambda: nothing_held(server), "before")
    before = descriptors(processes)

    crowd, memory = Crowd(server), Memory(processes)
    crowd.soak(memory)

    until(lambda: nothing_held(server), "after")
    until(lambda: descriptors_are_back(processes, before), "descriptors")
    assert processes_of(server) == processes, "a process of the server has ended"
    sums = metrics(server)
    for reason in ("internal", "lost", "full", "unavailable"):
        assert sums["headrace_request_failures_total", reason] == 0, reason
    growth = memory.growth()
    assert max(growth) < MOST_GROWTH_BYTES, f"bytes of each process: {growth}"
    assert not [line for line in server.lines if "Traceback" in line], "".join(server.lines)
    _log.info("in %.0f s: %s; growth %s bytes", SOAK_S, dict(sorted(crowd.done.items())), growth)

    with ThreadPoolExecutor(UNDER_WAY) as pool:
        asked = [pool.submit(ask, server, 0, GATE_ID)]
        with server.gate.open("w"):  # opens when the model has it
            asked += [pool.submit(ask, server, seed) for seed in range(1, UNDER_WAY)]
            until(lambda: (under_way(server) == UNDER_WAY, under_way(server)), "under way")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: (any("stopping" in line for line in server.lines), server.lines), "stopping")
        for future in asked:
            future.result(WAIT_S)
    assert server.process.wait(WAIT_S) == 0
    _, alive = psutil.wait_procs(processes, WAIT_S)
    assert not alive
