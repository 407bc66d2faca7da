"""A backend with much memory is killed: its clients hear of it while the system still takes that memory back.

What is in time is told by a ratio to the process's own end. `--log-cli-level INFO` shows what was measured.
"""

import logging
import os
import re
import select
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from headrace.client import Client
from headrace.errors import EngineStopped
from tests.serving import WAIT_S, Server
from tests.test_failures import HOLDS, MODEL, Grpc, Http, in_flight, until

# In small pages, all of them touched, so that it takes the system long to have them back.
MEMORY = """
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

MEMORY = mmap(-1, 3 << 30, MAP_PRIVATE | MAP_ANONYMOUS)
MEMORY.madvise(MADV_NOHUGEPAGE)
MEMORY[::PAGESIZE] = bytes((3 << 30) // PAGESIZE)
"""
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--num-workers", "1", "--lane-depth", "1", "--frontends", "1")
    server = Server(tmp_path_factory.mktemp("server"), *options, model=MEMORY + MODEL)
    with grpc.insecure_channel(server.grpc_address) as server.channel:
        yield server
    assert server.stop() == 0


@pytest.fixture
def client(server):
    with Client(f"http://{server.address}", timeout=WAIT_S) as client:
        yield client


@dataclass(frozen=True)
class Told:
    """How a request of `Client` ended, and when."""

    error: Exception | None
    at_s: float


def ask_over_the_ring(client, number):
    try:
        answer = client.infer("served", {"ids": np.full((1, 4), number)})
    except EngineStopped as error:
        return Told(error, time.monotonic())
    assert answer["next"][0, 0] == number + 1
    return Told(None, time.monotonic())


def when_readable(descriptor):
    assert select.select([descriptor], [], [], WAIT_S)[0]
    return time.monotonic()


def on_the_ring(client):
    """Return how many requests a client has under way over its only ring."""
    (engines,) = client._core._rings._engines.values()
    return sum(link.in_flight for link in engines.links)


def held(server):
    """Return what is open, by kind, and the supervisor's threads: the processes that outlive a backend.

    The frontend's memory and threads are left out: its rings are unmapped and gRPC's threads end at some other time.
    """
    supervisor, frontend = psutil.Process(server.process.pid), server.frontend()
    kinds = Counter(open_by(frontend.pid))
    told_by = [kinds[kind] for kind in ("pipe", "anon_inode:[pidfd]", "anon_inode:[eventpoll]")]
    return sorted(open_by(supervisor.pid)), supervisor.num_threads(), told_by


def open_by(pid):
    """Return what a process has open, without the numbers of pipes and sockets."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(re.sub(r":\[\d+\]", "", str(link.readlink())))
    return found


def lost(server):
    """Return how many requests the frontends have answered with the loss of their backend."""
    lines = server.call("/metrics")[2].decode().splitlines()
    (line,) = (line for line in lines if line.startswith("headrace_request_failures_total") and '"lost"' in line)
    return int(line.rpartition(" ")[2])


def test_clients_of_a_killed_backend_are_told_before_its_memory_has_been_given_back(server, client):
    assert [way.ask(server, 1).value for way in (Http, Grpc)] == [2, 2]
    assert ask_over_the_ring(client, 1).error is None
    assert client.transport == "ring"
    before = held(server)
    backend = server.backend()
    ended_fd = os.pidfd_open(backend.pid)
    with ThreadPoolExecutor(5) as pool:
        ended = pool.submit(when_readable, ended_fd)
        asked = [pool.submit(Http.ask, server, HOLDS)]
        with server.gate.open("w"):  # opens when the model has it
            asked += [pool.submit(way.ask, server, number) for number, way in enumerate((Http, Grpc), 100)]
            over_the_ring = pool.submit(ask_over_the_ring, client, 102)
            until(lambda: in_flight(server) == 3 and on_the_ring(client) == 1)
            killed_s = time.monotonic()
            backend.kill()
            answers = [future.result(WAIT_S) for future in asked]
            told = over_the_ring.result(WAIT_S)
        ended_s = ended.result(WAIT_S)
    os.close(ended_fd)
    first_s, last_s = (each(answer.at_s for answer in [*answers, told]) for each in (min, max))
    _log.info(
        "backend with 3 GiB killed: told after %.1f to %.1f ms, ended after %.1f ms",
        *((each - killed_s) * 1000 for each in (first_s, last_s, ended_s)),
    )
    assert [answer.status for answer in answers] == [Http.gone, Http.gone, Grpc.gone]
    assert isinstance(told.error, EngineStopped)
    assert last_s - killed_s < (ended_s - killed_s) / 2
    server.wait_for("ready again")
    until(server.is_ready)
    assert lost(server) == 3
    assert [way.ask(server, 200).value for way in (Http, Grpc)] == [201, 201]
    assert ask_over_the_ring(client, 202).error is None
    until(lambda: held(server) == before)
