"""The server's door: who gets a ring and how large, who is sent away, and that nobody can hold it up."""

import os
import select
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest

from headrace.client.knock import ask_for_models, ask_for_ring
from headrace.control import ServedModel
from headrace.door import ASK_LIMIT_S, Backend, DoorLimits, open_door
from headrace.door import Door as RealDoor
from headrace.door_messages import LENGTH, Ask, door_of, doors_of, encode, socket_address
from headrace.errors import InvalidOption, NotReady, QueueFull, TransportFailed, UnknownModel, Unreachable
from headrace.tensors import TensorSpec

WAIT_S = 60
SPEC = TensorSpec(name="x", dtype="float32", features=(1024,))
MODEL = ServedModel(name="m", version="1", inputs=(SPEC,), outputs=(SPEC,), max_batch_size=4)
LIMITS = DoorLimits(rows_of=lambda _: 16, total_bytes=1 << 20)


class Supervisor:
    """Lets in whoever knocks, as long as it lives, and keeps the backend's ends of the rings."""

    def __init__(self, door):
        self.door = door
        self.rings = []
        self.refusal = None
        self.wake_fd = os.eventfd(0)
        self.ending_fd, self.ending = os.pipe()
        self._stop_fd = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def offer(self, model=MODEL, engine=0, pid=None):
        self.door.offer(model, Backend(pid or os.getpid(), self.wake_fd, self.ending_fd), engine)

    def _run(self):
        while True:
            ready, _, _ = select.select([self.door.fd, self._stop_fd], [], [])
            if self._stop_fd in ready:
                return
            for knock in self.door.knocks():
                if self.refusal is not None:
                    knock.refuse(self.refusal)
                    continue
                self.rings.append(os.dup(knock.ring.peer_fd))
                knock.grant()

    def stop(self):
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(WAIT_S)
        self.door.close()
        for descriptor in (*self.rings, self.wake_fd, self.ending_fd, self.ending, self._stop_fd):
            os.close(descriptor)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "door.sock")


@pytest.fixture
def supervisor(path):
    supervisor = Supervisor(open_door(path, ("127.0.0.1", 1), LIMITS, pytest.fail))
    yield supervisor
    supervisor.stop()


def is_readable(descriptor, timeout_s=WAIT_S):
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WAIT_S)
    connection.connect(path)
    return connection


@pytest.mark.parametrize(("wanted", "rows"), [(0, 8), (1, 4), (5, 5), (1000, 16)])
def test_a_ring_has_the_rows_that_were_asked_for_within_the_limits(supervisor, path, wanted, rows):
    supervisor.offer()
    ring = ask_for_ring((path,), Ask(model="m", rows=wanted))
    assert ring.model == MODEL
    assert ring.pair.layout.rows == rows
    assert os.fstat(ring.pair.memory_fd).st_size == ring.pair.layout.total_bytes
    assert not os.get_inheritable(ring.pair.memory_fd)
    ring.close()


def test_a_client_that_goes_is_seen_at_the_backends_end(supervisor, path):
    supervisor.offer()
    ring = ask_for_ring((path,), Ask(model="m"))
    assert not is_readable(supervisor.rings[0], 0)
    ring.close()
    assert is_readable(supervisor.rings[0])


def test_a_client_has_what_tells_of_the_backends_end_and_of_its_beginning(supervisor, path):
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    supervisor.offer(pid=process.pid)
    ring = ask_for_ring((path,), Ask(model="m"))
    assert not is_readable(ring.pair.ending_fd, 0)
    os.write(supervisor.ending, b".")
    assert is_readable(ring.pair.ending_fd)
    assert not is_readable(ring.pair.peer_fd, 0)
    process.communicate(b"", WAIT_S)
    assert is_readable(ring.pair.peer_fd)
    ring.close()


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (Ask(model="other"), NotReady),
        (Ask(model="m", version="7"), UnknownModel),
    ],
)
def test_a_model_that_is_not_there_is_refused(supervisor, path, ask, error):
    supervisor.offer()
    with pytest.raises(error):
        ask_for_ring((path,), ask)


def test_what_the_supervisor_refuses_with_is_raised(supervisor, path):
    supervisor.offer()
    supervisor.refusal = NotReady("it has just died")
    with pytest.raises(NotReady, match="it has just died"):
        ask_for_ring((path,), Ask(model="m"))


def test_models_that_are_ready_are_told(supervisor, path):
    assert ask_for_models((path,)) == ()
    supervisor.offer()
    assert ask_for_models((path,)) == (MODEL,)
    supervisor.door.withdraw(os.getpid())
    assert ask_for_models((path,)) == ()


def test_all_rings_of_a_process_have_a_bound_and_room_comes_back(supervisor, path):
    supervisor.offer()
    rings = [ask_for_ring((path,), Ask(model="m"))]
    ring_bytes = rings[0].pair.layout.total_bytes
    rings += [ask_for_ring((path,), Ask(model="m")) for _ in range(LIMITS.total_bytes // 2 // ring_bytes - 1)]
    with pytest.raises(QueueFull, match="this process's rings have"):
        ask_for_ring((path,), Ask(model="m"))
    for ring in rings:
        ring.close()
    for descriptor in supervisor.rings:
        assert is_readable(descriptor)
    while True:  # the door sees it at the same moment as the backend, on a thread of its own
        try:
            ask_for_ring((path,), Ask(model="m")).close()
        except QueueFull:
            continue
        break


def test_a_version_that_is_withdrawn_has_its_clients_ask_again(supervisor, path):
    supervisor.offer()
    ring = ask_for_ring((path,), Ask(model="m"))
    supervisor.door.withdraw(os.getpid())
    assert is_readable(ring.connection)
    assert not is_readable(supervisor.rings[0], 0), "what is under way is still answered"
    ring.close()


def test_a_newer_version_is_for_those_who_named_none(supervisor, path):
    supervisor.offer()
    newest, named = ask_for_ring((path,), Ask(model="m")), ask_for_ring((path,), Ask(model="m", version="1"))
    supervisor.offer(replace(MODEL, version="10"))
    assert is_readable(newest.connection)
    assert not is_readable(named.connection, 0)
    again = ask_for_ring((path,), Ask(model="m"))
    assert again.model.version == "10"
    for ring in (newest, named, again):
        ring.close()


@pytest.mark.parametrize(
    "said",
    [
        LENGTH.pack(5000),
        LENGTH.pack(2) + b"[]",
        LENGTH.pack(13) + b'{"model": 12}',
        LENGTH.pack(11) + b'{"what": 1}',
        LENGTH.pack(14) + b'{"model": "\xff"}',
        encode(Ask(model="m")) + b"more",
    ],
    ids=["too long", "no object", "wrong type", "unknown field", "no UTF-8", "more than a question"],
)
def test_what_is_no_question_ends_the_connection_and_nobody_elses(supervisor, path, said):
    supervisor.offer()
    with connect(path) as connection:
        connection.sendall(said)
        assert connection.recv(1) == b""
    ask_for_ring((path,), Ask(model="m")).close()


def test_a_client_that_says_nothing_holds_up_nobody_and_is_sent_away(supervisor, path):
    supervisor.offer()
    with connect(path) as silent, connect(path) as slow:
        slow.sendall(encode(Ask(model="m"))[:7])
        ask_for_ring((path,), Ask(model="m")).close()
        assert ASK_LIMIT_S < WAIT_S
        assert silent.recv(1) == b""
        assert slow.recv(1) == b""


def test_a_client_that_says_more_after_its_question_loses_its_ring(supervisor, path):
    supervisor.offer()
    ring = ask_for_ring((path,), Ask(model="m"))
    ring.connection.sendall(b"x")
    assert is_readable(supervisor.rings[0])
    ring.close()


def test_a_user_who_is_not_trusted_is_sent_away(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "other.sock"))
    listener.listen()
    door = RealDoor(listener, LIMITS, trusts=lambda user: user != os.geteuid())
    door.open()
    with pytest.raises(Unreachable, match="does not answer"):
        ask_for_ring((str(tmp_path / "other.sock"),), Ask(model="m"))
    door.close()


def test_a_server_of_a_user_who_is_not_trusted_gets_nothing(supervisor, path):
    supervisor.offer()
    with pytest.raises(Unreachable, match=f"belongs to user {os.geteuid()}"):
        ask_for_ring((path,), Ask(model="m"), trusts=lambda user: user != os.geteuid())


def test_a_server_that_answers_something_else_is_not_believed(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with ThreadPoolExecutor(1) as pool:
        for said, words in (
            (LENGTH.pack(2) + b"{}", "no message"),
            (LENGTH.pack(1 << 30), "at most"),
            (encode_answer({"type": "models", "models": []}), "granted no ring"),
            (encode_answer({"type": "refused", "error": "Nonsense", "text": "so"}), "so"),
            (encode_answer({"type": "granted", "rows": 4, "model": msgspec.to_builtins(MODEL)}), "0 descriptors"),
        ):
            asking = pool.submit(ask_for_ring, (path,), Ask(model="m"))
            with listener.accept()[0] as connection:
                connection.sendall(said)
                with pytest.raises(TransportFailed, match=words):
                    asking.result(WAIT_S)
    listener.close()


def encode_answer(value):
    body = msgspec.json.encode(value)
    return LENGTH.pack(len(body)) + body


def test_nobody_is_there(path):
    with pytest.raises(Unreachable, match=r"door\.sock"):
        ask_for_ring((path,), Ask(model="m"))
    with pytest.raises(Unreachable, match="not on this host"):
        ask_for_ring((), Ask(model="m"))


def test_a_socket_that_a_killed_server_left_is_replaced_and_one_that_answers_is_not(path):
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(path)
    door = open_door(path, ("127.0.0.1", 1), LIMITS, pytest.fail)
    with pytest.raises(InvalidOption, match="cannot listen there"):
        open_door(path, ("127.0.0.1", 1), LIMITS, pytest.fail)
    door.close()
    assert not os.path.exists(path)  # noqa: PTH110


def test_a_derived_name_that_is_taken_is_told_and_the_server_goes_on():
    address = ("127.0.0.1", os.getpid() + 100_000)  # no port, so nobody else's
    told = []
    first = open_door("auto", address, LIMITS, pytest.fail)
    second = open_door("auto", address, LIMITS, told.append)
    assert "without shared memory" in told[0]
    second.close()
    assert ask_for_models((door_of(*address),)) == ()
    first.close()
    with pytest.raises(Unreachable):
        ask_for_models((door_of(*address),))


def test_a_closed_door_keeps_no_descriptor(path):
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    supervisor = Supervisor(open_door(path, ("127.0.0.1", 1), LIMITS, pytest.fail))
    supervisor.offer()
    ring = ask_for_ring((path,), Ask(model="m"))
    supervisor.stop()
    assert is_readable(ring.connection)
    ring.close()
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    ("url", "doors"),
    [
        ("http://127.0.0.1:8000", ("@headrace/127.0.0.1:8000", "@headrace/0.0.0.0:8000")),
        ("http://127.0.0.1:8000/", ("@headrace/127.0.0.1:8000", "@headrace/0.0.0.0:8000")),
        ("http://[::1]:9", ("@headrace/::1:9", "@headrace/:::9")),
        ("http://10.1.2.3", ("@headrace/10.1.2.3:80",)),
        ("https://10.1.2.3", ("@headrace/10.1.2.3:443",)),
        ("http://example.org:8000", ()),
        ("http://127.0.0.1:8000/behind/a/proxy", ()),
    ],
)
def test_where_a_door_may_be_follows_from_the_url_if_the_server_is_this_host(url, doors):
    assert doors_of(url) == doors


def test_localhost_may_be_either_family():
    assert doors_of("http://localhost:1")[::2] == ("@headrace/127.0.0.1:1", "@headrace/::1:1")


def test_an_abstract_name_begins_with_nul():
    assert socket_address("@headrace/x") == "\0headrace/x"
    assert socket_address("/run/x") == "/run/x"


def test_a_client_hears_which_engines_there_are_and_can_ask_for_each(supervisor, path):
    supervisor.offer(engine=0)
    supervisor.offer(engine=1, pid=os.getppid())
    assert ask_for_models((path,)) == (MODEL,), "one model, however many engines"
    first = ask_for_ring((path,), Ask(model="m"))
    assert first.engines == (0, 1)
    other = ask_for_ring((path,), Ask(model="m", engine=1 - first.engine))
    assert other.engine != first.engine
    with pytest.raises(NotReady, match="engine 2 of model m, version 1"):
        ask_for_ring((path,), Ask(model="m", engine=2))
    for ring in (first, other):
        ring.close()


def test_clients_that_do_not_choose_are_spread_over_the_engines(supervisor, path):
    supervisor.offer(engine=0)
    supervisor.offer(engine=1, pid=os.getppid())
    rings = [ask_for_ring((path,), Ask(model="m", rows=4)) for _ in range(6)]
    assert sorted(ring.engine for ring in rings) == [0, 0, 0, 1, 1, 1]
    for ring in rings:
        ring.close()


def test_an_engine_that_ends_has_its_clients_ask_again_and_one_that_comes_all_of_the_version(supervisor, path):
    supervisor.offer(engine=0)
    supervisor.offer(engine=1, pid=os.getppid())
    rings = {engine: ask_for_ring((path,), Ask(model="m", engine=engine)) for engine in (0, 1)}
    supervisor.door.withdraw(os.getppid())
    assert is_readable(rings[1].connection)
    assert not is_readable(rings[0].connection, 0)
    assert ask_for_ring((path,), Ask(model="m")).engines == (0,)
    supervisor.offer(engine=1, pid=os.getppid())
    assert is_readable(rings[0].connection), "to use the new one too"
    for ring in rings.values():
        ring.close()
