"""A client's ring against a backend in this process: room in order of arrival, limits, and ends of all kinds."""

import asyncio
import gc
import os
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from headrace import AsyncClient, Client
from headrace.control import ServedModel
from headrace.door import Backend as Engine
from headrace.door import DoorLimits, open_door
from headrace.errors import DeadlineExceeded, EngineStopped, InvalidRequest, NotReady, QueueFull
from headrace.frontend.link import ModelFailed
from headrace.tensors import TensorSpec
from headrace.transport.ring import RingEndpoint

WAIT_S = 60
ROWS = 4
SPEC = TensorSpec(name="x", dtype="float32", features=(2,))
DOUBLED = TensorSpec(name="doubled", dtype="float32", features=(2,))
MODEL = ServedModel(name="m", version="1", inputs=(SPEC,), outputs=(DOUBLED,), max_batch_size=ROWS)


class Backend:
    """Lets clients in, and doubles what they send: at once, or when told to."""

    def __init__(self, path):
        self.door = open_door(
            path, ("127.0.0.1", 1), DoorLimits(rows_of=lambda _: ROWS, total_bytes=1 << 20), pytest.fail
        )
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ending_fd, self.ending = os.pipe()
        self.ends = []
        self.holding = threading.Event()  # answers are held back
        self.taken = threading.Semaphore(0)
        self._held = []
        self._stop_fd = os.eventfd(0)
        self.offer()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def offer(self, engine=0):
        """Offer the first engine, or another one that is answered for here too."""
        self.door.offer(MODEL, Engine(os.getppid() if engine else os.getpid(), self.wake_fd, self.ending_fd), engine)

    def release(self):
        self.holding.clear()
        os.eventfd_write(self.wake_fd, 1)

    def _run(self):
        while True:
            for end in self.ends:
                end.arm()
            ready, _, _ = select.select([self.door.fd, self.wake_fd, self._stop_fd], [], [], 0.05)
            if self._stop_fd in ready:
                return
            for end in self.ends:
                end.disarm()
            for knock in self.door.knocks():
                pair = knock.ring
                copy = type(pair)(pair.layout, *(os.dup(fd) for fd in pair._descriptors()))
                self.ends.append(RingEndpoint(copy, lambda memory: lambda: None))
                knock.grant()
            self._answer()

    def _answer(self):
        for end in self.ends:
            for ticket in end.take(0) or ():
                self._held.append(ticket)
                self.taken.release()
        if self.holding.is_set():
            return
        held, self._held = self._held, []
        for ticket in held:
            rows = slice(ticket.first_row, ticket.first_row + ticket.rows)
            inputs = ticket.source.table.inputs[0][rows]
            if (inputs == 13).any():
                ticket.error = ValueError("thirteen in /srv/x.py")
            ticket.source.table.outputs[0][rows] = inputs * 2
            ticket.source.finish([ticket])

    def stop(self):
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(WAIT_S)
        self.door.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "door.sock")


@pytest.fixture
def backend(path):
    backend = Backend(path)
    yield backend
    backend.stop()


@pytest.fixture
def client(backend, path):
    with Client(ring=path, timeout=WAIT_S) as client:
        yield client


def link_of(client):
    (engines,) = client._core._rings._engines.values()
    return engines.links[0]


def batch(rows, value=1.0):
    return np.full((rows, 2), value, np.float32)


def test_without_a_url_there_is_only_the_ring(client):
    np.testing.assert_array_equal(client.infer("m", batch(3))["doubled"], batch(3, 2.0))
    assert client.transport == "ring"
    assert client.is_ready()
    assert client.metadata("m")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    with pytest.raises(NotReady, match="other"):
        client.infer("other", batch(1))


def test_outputs_are_the_callers_own(client):
    first = client.infer("m", batch(1, 1.0))["doubled"]
    for value in range(ROWS + 1):
        client.infer("m", batch(1, value))
    np.testing.assert_array_equal(first, batch(1, 2.0))


def test_a_model_that_raises_fails_that_request_and_gives_its_rows_back(client):
    for _ in range(2 * ROWS):
        with pytest.raises(ModelFailed, match=r"thirteen in \(path\)"):
            client.infer("m", batch(1, 13.0))
    np.testing.assert_array_equal(client.infer("m", batch(ROWS))["doubled"], batch(ROWS, 2.0))


def test_more_rows_than_a_batch_are_refused(client):
    with pytest.raises(InvalidRequest, match="has 5 rows"):
        client.infer("m", batch(5))


def test_requests_wait_for_room_and_get_it_in_order(backend, client):
    backend.holding.set()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.infer, "m", batch(3))
        assert backend.taken.acquire(timeout=WAIT_S)
        large = pool.submit(client.infer, "m", batch(4))
        link = link_of(client)
        while not link._line:
            pass
        small = pool.submit(client.infer, "m", batch(1))
        while len(link._line) < 2:
            pass
        assert link.ring.free_rows == 1, "the small one would fit, and waits behind the large one"
        backend.release()
        for future, rows in ((first, 3), (large, 4), (small, 1)):
            np.testing.assert_array_equal(future.result(WAIT_S)["doubled"], batch(rows, 2.0))
    assert not link._line
    assert link.ring.free_rows == ROWS


def test_room_that_does_not_come_in_time_is_told(backend, client):
    backend.holding.set()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.infer, "m", batch(4))
        assert backend.taken.acquire(timeout=WAIT_S)
        with pytest.raises(QueueFull, match=r"no 1 of the ring's 4 rows were free for 0\.05 s"):
            client.infer("m", batch(1), timeout=0.05)
        backend.release()
        held.result(WAIT_S)
    client.infer("m", batch(4))


def test_an_answer_that_does_not_come_in_time_is_given_up_and_its_rows_come_back(backend, client):
    backend.holding.set()
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
        client.infer("m", batch(4), timeout=0.05)
    backend.release()
    np.testing.assert_array_equal(client.infer("m", batch(4))["doubled"], batch(4, 2.0))


def test_rows_may_be_written_and_read_where_they_lie_and_used_again(client):
    with client.allocate("m", 2) as call:
        for value in (1.0, 3.0):
            call.inputs["x"][:] = value
            outputs = call.infer()
            np.testing.assert_array_equal(outputs["doubled"], batch(2, 2 * value))
    link = link_of(client)
    assert link.ring.free_rows == ROWS


def test_rows_of_a_request_that_was_given_up_are_not_used_again(backend, client):
    backend.holding.set()
    with client.allocate("m", 4) as call:
        with pytest.raises(DeadlineExceeded):
            call.infer(timeout=0.05)
        with pytest.raises(DeadlineExceeded, match="allocate anew"):
            call.infer()
        backend.release()
    np.testing.assert_array_equal(client.infer("m", batch(4))["doubled"], batch(4, 2.0))


def test_a_withdrawn_ring_answers_what_it_has_and_another_one_serves_the_rest(backend, client):
    backend.holding.set()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.infer, "m", batch(2))
        assert backend.taken.acquire(timeout=WAIT_S)
        link = link_of(client)
        backend.door.withdraw(os.getpid())
        while not link.is_retired:
            pass
        with pytest.raises(NotReady):
            client.infer("m", batch(1))
        backend.offer()
        backend.release()
        np.testing.assert_array_equal(held.result(WAIT_S)["doubled"], batch(2, 2.0))
    with Client(ring=client._core._config.doors[0], retries=3) as patient:
        patient.infer("m", batch(1))


def test_a_door_that_refused_is_asked_again_after_a_while(backend, path):
    backend.door.withdraw(os.getpid())
    with Client(ring=path, retries=20, timeout=WAIT_S) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.infer, "m", batch(1))
        while not client._core._rings._pauses:
            pass
        backend.offer()
        np.testing.assert_array_equal(waiting.result(WAIT_S)["doubled"], batch(1, 2.0))


def test_closing_a_client_ends_what_it_waits_for(backend, path):
    backend.holding.set()
    client = Client(ring=path)
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(client.infer, "m", batch(4))
        assert backend.taken.acquire(timeout=WAIT_S)
        waiting = pool.submit(client.infer, "m", batch(4))
        link = link_of(client)
        while not link._line:
            pass
        client.close()
        with pytest.raises(EngineStopped, match="client was closed"):
            held.result(WAIT_S)
        with pytest.raises(EngineStopped):
            waiting.result(WAIT_S)


def test_a_client_keeps_no_descriptor(backend, path):
    gc.collect()  # what earlier tests let go
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Client(ring=path) as client:
        client.infer("m", batch(1))
        during = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert len(during) > len(before)
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd not in before}  # noqa: PTH115, PTH208
    assert "anon_inode:[eventpoll]" not in own
    assert "anon_inode:[pidfd]" not in own


def test_tasks_wait_for_room_and_a_cancelled_one_gives_its_rows_back(backend, path):
    async def run():
        async with AsyncClient(ring=path, timeout=WAIT_S) as client:
            await client.infer("m", batch(1))
            backend.taken.acquire()
            backend.holding.set()
            held = asyncio.create_task(client.infer("m", batch(4)))
            await asyncio.to_thread(backend.taken.acquire)
            waiting = asyncio.create_task(client.infer("m", batch(4)))
            with pytest.raises(QueueFull):
                await client.infer("m", batch(1), timeout=0.05)
            held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            backend.release()
            return await waiting

    np.testing.assert_array_equal(asyncio.run(run())["doubled"], batch(4, 2.0))


def test_closing_an_async_client_ends_what_it_waits_for(backend, path):
    async def run():
        backend.holding.set()
        async with AsyncClient(ring=path) as client:
            held = asyncio.create_task(client.infer("m", batch(4)))
            await asyncio.to_thread(backend.taken.acquire)
        with pytest.raises(EngineStopped, match="client was closed"):
            await held

    asyncio.run(run())


def test_requests_are_spread_over_the_rings_to_all_engines(backend, path):
    backend.offer(engine=1)
    with Client(ring=path, timeout=WAIT_S) as client, ThreadPoolExecutor(2) as pool:
        backend.holding.set()
        held = [pool.submit(client.infer, "m", batch(ROWS, value)) for value in (1.0, 2.0)]
        for _ in held:
            assert backend.taken.acquire(timeout=WAIT_S), "neither waits for the other's room"
        (engines,) = client._core._rings._engines.values()
        assert [link.ring.free_rows for link in engines.links] == [0, 0]
        backend.release()
        for value, future in zip((1.0, 2.0), held, strict=True):
            np.testing.assert_array_equal(future.result(WAIT_S)["doubled"], batch(ROWS, 2 * value))


def test_an_engine_that_goes_leaves_the_others_and_one_that_comes_is_used(backend, path):
    backend.offer(engine=1)
    with Client(ring=path, timeout=WAIT_S) as client:

        def engines_after(change):
            client.infer("m", batch(1))
            (before,) = client._core._rings._engines.values()
            change()
            while before.is_whole:
                pass
            np.testing.assert_array_equal(client.infer("m", batch(1))["doubled"], batch(1, 2.0))
            (engines,) = client._core._rings._engines.values()
            return sorted(link.engine for link in engines.links)

        assert engines_after(lambda: backend.door.withdraw(os.getppid())) == [0]
        assert engines_after(lambda: backend.offer(engine=1)) == [0, 1]
        assert client.transport == "ring"


def test_a_request_that_waits_for_room_at_an_engine_that_goes_is_taken_by_another(backend, path):
    backend.offer(engine=1)
    backend.holding.set()
    with Client(ring=path, timeout=WAIT_S) as client, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(client.infer, "m", batch(ROWS)) for _ in range(2)]
        for _ in held:
            assert backend.taken.acquire(timeout=WAIT_S)
        (engines,) = client._core._rings._engines.values()
        waiting = pool.submit(client.infer, "m", batch(ROWS))
        while not (lines := [link for link in engines.links if link._line]):
            pass
        backend.door.withdraw(os.getppid() if lines[0].engine else os.getpid())
        while not lines[0].is_retired:
            pass
        backend.release()
        for future in (*held, waiting):
            np.testing.assert_array_equal(future.result(WAIT_S)["doubled"], batch(ROWS, 2.0))
