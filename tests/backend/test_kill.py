"""Processes that are killed at any stage of a request: nothing of them is left, and others are served as before."""

import gc
import importlib
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.control import Stop
from headrace.errors import PeerGone
from headrace.transport.descriptors import ANSWER, request, unpack
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient
from tests.backend.children import BEFORE_TAKING, HOOKS, obey, serve_until
from tests.backend.fakes import WAIT_S, Backend, layout_of

LONGER_S = 2 * WAIT_S  # of a call that a death must end first
NUMBERS = 100  # of one client's requests

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.backend.children", "headrace.transport.table"])


@pytest.fixture(scope="module", autouse=True)
def server_of_processes():
    """Start what starts the children, so that its descriptors are there before any are counted.

    An import keeps the frames that it came from for a while, and the first ring imports the table.
    """
    importlib.import_module("headrace.transport.table")
    process = CHILDREN.Process(target=int, daemon=True)
    process.start()
    process.join(WAIT_S)
    process.close()


def open_descriptors():
    gc.collect()  # what earlier tests left behind
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def inode_of(pair):
    return os.fstat(pair.memory_fd).st_ino


def mapped(inodes):
    """Return which of these files this process still maps."""
    return inodes & {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}


class Child:
    """A process that obeys. `number` begins the numbers of its requests."""

    def __init__(self, target, number, *args):
        self.number = number
        self._sent = 0
        self._orders, theirs = CHILDREN.Pipe()
        self.process = CHILDREN.Process(target=target, args=(*args, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._confirmed()

    def _confirmed(self):
        assert self._orders.poll(WAIT_S), "the child does not answer"
        self._orders.recv()

    def order(self, name, *arguments):
        self._orders.send((name, *arguments))
        self._confirmed()

    def send(self, *sizes, by="send"):
        """Have requests of so many rows sent; return their numbers."""
        numbers = range(self.number + self._sent, self.number + self._sent + len(sizes))
        self._sent += len(sizes)
        for number, rows in zip(numbers, sizes, strict=True):
            self.order(by, number, rows)
        return numbers

    def send_and_die(self, rows, *, by):
        """Have a request sent in a way that its sender does not survive."""
        self._orders.send((by, self.number, rows))
        self.process.join(WAIT_S)

    def kill(self):
        self.process.kill()
        self.process.join(WAIT_S)
        assert self.process.exitcode == -signal.SIGKILL

    def let_go(self):
        """Have it end by itself."""
        self._orders.send(None)
        self.process.join(WAIT_S)
        assert self.process.exitcode == 0

    def close(self):
        self.process.close()
        self._orders.close()


@dataclass
class Scene:
    """Clients of one backend, some of which will be killed."""

    backend: Backend
    survivors: list[Child]
    victims: dict[Child, tuple[str, list[int]]]  # the stage, and the rows of its requests
    not_to_be_computed: list[int] = field(default_factory=list)

    def at(self, *stages):
        return [(child, sizes) for child, (stage, sizes) in self.victims.items() if stage in stages]

    def play(self):
        """Bring each victim to its stage, in an order in which all of them hold at once."""
        backend = self.backend
        for child, sizes in self.at("answered, not read"):
            child.send(*sizes)
            child.order("await_answer")
        backend.arrivals.wait_for_turns()
        backend.lanes.hold()
        for child, sizes in self.at("launched"):
            backend.lanes.wait_until_launched(child.send(sizes[0]))
        backend.lanes.wait_until_launched(self.survivors[0].send(1))  # all lanes are busy from here on
        waiting = [child.send(*sizes) for child, sizes in self.at("taken, waits")]
        self.not_to_be_computed += [number for numbers in waiting for number in numbers]
        for survivor in self.survivors:
            survivor.send(2, 1)
        backend.arrivals.wait_until(lambda: backend.dispatcher._waiting.rows >= self._rows_that_wait())
        backend.arrivals.stop()
        for child, sizes in self.at("sent, not taken"):
            self.not_to_be_computed += child.send(*sizes)
        for survivor in self.survivors:
            survivor.send(1)
        for child, sizes in self.at("leased, not sent"):
            child.send(*sizes, by="lease")

    def _rows_that_wait(self):
        return 3 * len(self.survivors) + sum(sum(sizes) for _, sizes in self.at("taken, waits"))

    def kill(self):
        for child, (stage, sizes) in self.victims.items():
            if stage in DEADLY:
                self.not_to_be_computed.append(child.number)
                child.send_and_die(sizes[0], by=DEADLY[stage])
            child.kill()

    def aftermath(self):
        """Let go of everything that was held, and have the survivors go on as if nothing had been."""
        backend = self.backend
        backend.arrivals.go_on()
        backend.arrivals.wait_until(lambda: backend.arrivals.buried == len(self.victims))
        assert not {*self.not_to_be_computed} & {*backend.lanes.launched}, "dropped before it was batched"
        backend.lanes.let_go()
        for survivor in self.survivors:
            survivor.send(*[1] * 4)
            survivor.order("finish")
            survivor.let_go()


DEADLY = {"while it writes": "die_while_writing", "before it wakes": "die_before_waking"}
STAGES = (
    *("connected", "leased, not sent", "sent, not taken", "taken, waits", "launched", "answered, not read"),
    *DEADLY,
)
VICTIM = st.tuples(st.sampled_from(STAGES), st.lists(st.integers(1, 4), min_size=1, max_size=3))


def serve_and_kill(victims, survivors, *, spin, fail=False):
    """Kill clients at their stages, and look that all is as if they had never been.

    With `fail`, the model fails on what the victims sent.
    """
    descriptors = open_descriptors()
    lanes = 1 + sum(stage == "launched" for stage, _ in victims)
    backend = Backend(lanes=lanes, spin=spin)
    if fail:
        backend.lanes.bad.update(range(NUMBERS * len(victims)))
    children, inodes = [], set()
    for number in range(len(victims) + survivors):
        pair = RingPair.create(layout_of(), backend.wake_fd)
        inodes.add(inode_of(pair))
        children.append(Child(obey, NUMBERS * number, pair))
        backend.attach(pair)
    backend.arrivals.wait_until(lambda: backend.registered == len(children))
    assert mapped(inodes) == inodes
    scene = Scene(backend, children[len(victims) :], dict(zip(children, victims, strict=False)))
    scene.play()
    scene.kill()
    scene.aftermath()
    backend.arrivals.wait_until(lambda: backend.registered == 0)
    backend.arrivals.wait_for_turns()
    assert mapped(inodes) == set(), "the rings' memory is given back"
    backend.arrivals.wait_until(lambda: backend.dispatcher._open_tickets == 0 and backend.free_lanes() == lanes)
    assert backend.dispatcher._waiting.rows == 0
    assert not {*scene.not_to_be_computed} & {*backend.lanes.launched}
    backend.end(Stop())
    for child in children:
        child.close()
    assert open_descriptors() == descriptors


WAYS = pytest.mark.parametrize("spin", [True, False], ids=["in a loop", "on threads"])


@WAYS
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_is_killed_at_any_stage_leaves_nothing(stage, spin):
    serve_and_kill([(stage, [2, 1])], 1, spin=spin)


@WAYS
@pytest.mark.parametrize("stage", ["launched", "answered, not read"])
def test_a_client_that_is_killed_leaves_nothing_though_its_requests_fail(stage, spin):
    serve_and_kill([(stage, [2, 1])] * 2, 1, spin=spin, fail=True)


@WAYS
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(victims=st.lists(VICTIM, min_size=1, max_size=4), survivors=st.integers(1, 2))
def test_clients_that_are_killed_together_leave_nothing_and_others_get_the_right_answers(spin, victims, survivors):
    serve_and_kill(victims, survivors, spin=spin)


def wait_for_the_end(client):
    """Return what was told until the engine was gone."""
    told = []
    while True:
        try:
            data = client.take(LONGER_S)
        except PeerGone:
            return told
        assert data, "the death did not end the wait"
        told += unpack(data)


@pytest.mark.parametrize("stage", [BEFORE_TAKING, *HOOKS])
def test_an_engine_that_is_killed_at_any_stage_is_told_to_every_client_at_once(stage):
    descriptors = open_descriptors()
    pairs = [RingPair.create(layout_of()) for _ in range(3)]
    inodes = {inode_of(pair) for pair in pairs}
    clients = [RingClient(pair) for pair in pairs]
    engine = Child(serve_until, 0, stage, pairs)
    for number, client in enumerate(clients):
        client.send(request(number, client.lease(2), 2))
    with ThreadPoolExecutor(len(clients)) as waiting:
        ends = [waiting.submit(wait_for_the_end, client) for client in clients]
        if stage == BEFORE_TAKING:
            engine.kill()
        engine.process.join(WAIT_S)
        told = [end.result(WAIT_S) for end in ends]
    assert engine.process.exitcode == -signal.SIGKILL
    assert all((each.request, each.kind) == (number, ANSWER) for number, own in enumerate(told) for each in own)
    assert any(told) == (stage == "answered")
    for client, pair in zip(clients, pairs, strict=True):
        with pytest.raises(PeerGone):
            client.take(LONGER_S)
        client.close()
        pair.close()
    engine.close()
    del client, clients
    assert open_descriptors() == descriptors
    assert mapped(inodes) == set()
