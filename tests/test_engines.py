"""A real server with two engines of one model: both serve, and one of them may die at any stage of its requests."""

import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http as triton
from tritonclient.utils import shared_memory

from headrace import Client
from tests import test_versions
from tests.serving import WAIT_S, Server

HOLDS = 77
CLIENTS = 8
SLOW_S, FAST_S = 0.08, 0.004
# Tells who answered. One process sleeps longer than the other, the one that was built first after `uneven` was made.
MODEL = f"""
import os
import pathlib
import time
import torch

FOLDER = pathlib.Path(__file__).parent

class Model(torch.nn.Module):
    def forward(self, ids):
        if (FOLDER / "uneven").exists():
            slowest = min(int(path.name[4:]) for path in FOLDER.glob("pid-*"))
            time.sleep({SLOW_S} if os.getpid() == slowest else {FAST_S})
        if (ids == {HOLDS}).any():  # until somebody opens the other end and closes it
            with open(os.environ["GATE"]) as gate:
                gate.read()
        return {{"answer": torch.stack([ids[:, 0] + 1, torch.full_like(ids[:, 0], os.getpid())], 1)}}

def build():
    (FOLDER / f"pid-{{os.getpid()}}").touch()
    if (FOLDER / "start").exists():
        (FOLDER / "start").read_text()  # until somebody writes there
    return Model()

def example_inputs():
    return {{"ids": torch.zeros(2, 1, dtype=torch.int64)}}
"""


class Engines(Server):
    def __init__(self, folder, *options):
        self.folder = folder
        super().__init__(folder, "--engines-per-device", "2", *options, model=MODEL)
        threading.Thread(target=self._read, daemon=True).start()
        self.said = threading.Condition()

    def _read(self):
        for line in self.process.stderr:
            with self.said:
                self.lines.append(line)
                self.said.notify_all()

    def until_said(self, words, times=1):
        """Wait until it has said this so many times."""
        with self.said:
            assert self.said.wait_for(lambda: sum(words in line for line in self.lines) >= times, WAIT_S), self.lines

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def pids(self):
        """Return the processes of the engines that were built and live."""
        built = {int(path.name[4:]) for path in self.folder.glob("pid-*")}
        alive = {child.pid for child in psutil.Process(self.process.pid).children()}
        for pid in built - alive:
            (self.folder / f"pid-{pid}").unlink()
        return built & alive

    def beside(self, pid, *, not_):
        """Wait for an engine beside this one that is not that one; return its process."""
        deadline = time.monotonic() + WAIT_S
        while not (others := self.pids() - {pid, not_}):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (other,) = others
        return other

    def ask(self, number):
        """Return status, and who answered or why nobody did."""
        given = {"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [number]}
        status, _, body = self.call("/v2/models/served/infer", {"inputs": [given]})
        told = json.loads(body)
        if status != 200:
            return status, told["error"]
        answer, pid = told["outputs"][0]["data"]
        assert answer == number + 1, "another request's answer"
        return status, pid

    def metrics(self, name):
        lines = self.call("/metrics")[2].decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(name)}

    def until_ready(self, engines):
        """Wait until so many engines take requests, by what the frontend has been told."""
        deadline = time.monotonic() + WAIT_S
        while self.live()["engines_ready"] != engines:
            assert time.monotonic() < deadline, self.live()

    def live(self):
        (model,) = json.loads(self.call("/live.json")[2])["models"]
        return model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Engines(tmp_path_factory.mktemp("server"), "--system-shared-memory")
    yield server
    server.process.kill()
    server.process.wait(WAIT_S)


@pytest.fixture(autouse=True)
def both(request):
    """Each test begins with two engines."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").until_ready(2)


@contextmanager
def load_on(server, ask):
    """Ask all the time from several threads; yield the answers: (status, text or process, when it was told)."""
    answers, stop = [], threading.Event()

    def client(number):
        while not stop.is_set():
            answers.append((*ask(number), time.monotonic()))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            yield answers
        finally:
            stop.set()
    for each in clients:
        each.result()


def until(condition, why):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.01)


def test_both_engines_answer_and_the_numbers_tell_their_shares(server):
    before = server.metrics("headrace_engine_requests_total")
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(server.ask, range(60)))
    assert {status for status, _ in answers} == {200}
    by_process = Counter(pid for _, pid in answers)
    assert by_process.keys() == server.pids()
    after = server.metrics("headrace_engine_requests_total")
    counted = sorted(count - before.get(name, 0) for name, count in after.items())
    assert counted == sorted(by_process.values())
    assert min(counted) > 0
    labels = '{model="served",version="1"}'
    assert server.metrics("headrace_engines") == {f"headrace_engines{labels}": 2, f"headrace_engines_ready{labels}": 2}
    assert {each["lane"] for each in server.live()["totals"]["lanes"]} == {0, 1}, (
        "lanes of all engines, numbered through"
    )


def test_the_faster_engine_gets_more(server):
    (server.folder / "uneven").touch()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(server.ask, range(100, 400)))
    finally:
        (server.folder / "uneven").unlink()
    slow, fast = sorted(Counter(pid for _, pid in answers).values())
    assert slow + fast == 300
    assert fast > 4 * slow


def test_a_shared_memory_region_serves_whichever_engine_answers(server):
    name = f"engines-test-{os.getpid()}"
    memory = shared_memory.create_shared_memory_region("r", name, 64)
    try:
        shared_memory.set_shared_memory_region(memory, [np.array([[5]], np.int64)])
        with triton.InferenceServerClient(server.address) as client:
            client.register_system_shared_memory("r", name, 64)
            ids = triton.InferInput("ids", [1, 1], "INT64")
            ids.set_shared_memory("r", 8)
            answer = triton.InferRequestedOutput("answer")
            answer.set_shared_memory("r", 16, offset=16)
            seen, deadline = set(), time.monotonic() + WAIT_S
            while len(seen) < 2 and time.monotonic() < deadline:  # one that was slow before is tried after a while
                client.infer("served", [ids], outputs=[answer])
                value, pid = shared_memory.get_contents_as_numpy(memory, np.int64, [4]).tolist()[2:]
                assert value == 6
                seen.add(pid)
            client.unregister_system_shared_memory()
    finally:
        shared_memory.destroy_shared_memory_region(memory)
    assert seen == server.pids()


def test_a_client_on_the_ring_uses_all_engines_and_goes_on_with_those_that_are_left(server):
    with Client(f"http://{server.address}") as client:

        def ask(number):
            answer, pid = client.infer("served", np.full((1, 1), number, np.int64))["answer"][0]
            assert answer == number + 1
            assert client.transport == "ring"
            return pid

        with ThreadPoolExecutor(CLIENTS) as pool:
            both = set(pool.map(ask, range(40)))
            assert both == server.pids()
            victim, survivor = sorted(both)
            os.kill(victim, signal.SIGKILL)
            server.until_said(" ended (exit code -9)")
            server.until_ready(1)
            assert set(pool.map(ask, range(20))) == {survivor}
            server.until_ready(2)
            assert set(pool.map(ask, range(40))) == server.pids()
        with client.allocate("served", 2) as call:
            call.inputs["ids"][:] = 3
            assert call.infer()["answer"][:, 0].tolist() == [4, 4]


def test_requests_that_wait_or_run_in_the_dead_engine_are_told_at_once_and_no_others(server):
    victim, survivor = sorted(server.pids())
    with ThreadPoolExecutor(12) as pool:
        held = [pool.submit(server.ask, HOLDS) for _ in range(12)]  # some run, the others wait behind them
        until(lambda: server.live()["totals"]["in_flight"] == 12, "the engines hold them")
        os.kill(victim, signal.SIGKILL)
        until(lambda: any(each.done() for each in held), "those of the victim are told while the gate is shut")
        until(lambda: server.live()["engines_ready"] == 1, "degraded")
        told = [each.result() for each in held if each.done()]
        assert {status for status, _ in told} == {503}
        assert all("the backend ended while it held this request" in why for _, why in told)
        assert 4 <= len(told) <= 8, "its share"
        assert server.is_ready(), "as long as one engine lives"
        release_until_done(server, held)
        rest = [each.result() for each in held if each.result() not in told]
    assert rest == [(200, survivor)] * (12 - len(told))


def release_until_done(server, held):
    """Open the gate for whoever comes to it, until none is held any more."""
    while wait(held, timeout=0.05).not_done:
        try:
            os.close(os.open(server.gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody waits there now
            continue


def test_under_load_only_what_the_dead_engine_held_is_lost_and_it_comes_back_for_its_share(server):
    victim, survivor = sorted(server.pids())
    with load_on(server, server.ask) as answers:
        until(lambda: len(answers) > 50, "under load")
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        until(lambda: server.live()["engines_ready"] == 1, "degraded")
        server.until_ready(2)
        new = server.beside(survivor, not_=victim)
        at = len(answers)
        until(lambda: Counter(who for _, who, _ in answers[at:])[new] > 20, "it takes load again")
    lost = [(why, at_s) for status, why, at_s in answers if status != 200]
    assert {status for status, _, _ in answers} <= {200, 503}
    assert len(lost) <= CLIENTS, "one for each that could wait there"
    assert all("the backend ended while it held this request" in why for why, _ in lost)
    assert all(at_s >= killed_s for _, at_s in lost)


def test_an_engine_that_dies_while_it_starts_is_started_again_and_the_other_one_serves(server):
    victim, survivor = sorted(server.pids())
    os.mkfifo(server.folder / "start")
    try:
        with load_on(server, server.ask) as answers:
            os.kill(victim, signal.SIGKILL)
            second = server.beside(survivor, not_=victim)
            os.kill(second, signal.SIGKILL)
            server.beside(survivor, not_=second)  # the next one is being built
            at = len(answers)
            until(lambda: len(answers) > at + 50, "the survivor serves")
            assert {who for _, who, _ in answers[at:]} == {survivor}
            (server.folder / "start").write_text("go")
            server.until_ready(2)
    finally:
        (server.folder / "start").unlink()
    assert Counter(status for status, _, _ in answers)[503] <= CLIENTS


def test_versions_are_switched_loaded_and_unloaded_with_two_engines_and_no_request_is_lost(tmp_path):
    folder = tmp_path / "models"
    test_versions.write(folder, "cat", 1)
    options = ("--model-control", "explicit", "--frontends", "2", "--engines-per-device", "2")
    server = test_versions.Server(folder, *options)
    try:
        test_versions.write(folder, "cat", 2)
        with test_versions.load_on(server, "cat") as answers:
            assert server.change("load", "cat") == (200, None)
            assert server.infer("cat", [0, 1, 0])[1]["model_version"] == "2"
            until(lambda: server.index("cat")["1"][0] == "UNAVAILABLE", "both engines of the old one have ended")
        assert {status for each in answers for status, _, _ in each} == {200}
        assert {version for each in answers for _, version, _ in each} == {"1", "2"}
        assert all(float(version) == factor for each in answers for _, version, factor in each)
        assert server.index("cat") == {"1": ("UNAVAILABLE", "unloaded"), "2": ("READY", "")}
        assert server.change("unload", "cat") == (200, None)
        assert server.infer("cat", [0, 1, 0])[0] == 404
        torches = [child for child in psutil.Process(server.process.pid).children() if is_engine(child.pid)]
        psutil.wait_procs(torches, WAIT_S)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in torches)
        assert server.change("load", "cat") == (200, None)
        assert server.infer("cat", [0, 1, 0])[0] == 200
    finally:
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0


def is_engine(pid):
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return False
