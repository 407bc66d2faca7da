"""Both clients against a real server, by shared memory and over HTTP: right answers, every error, all kinds of ends."""

import asyncio
import http.server
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch

from headrace import AsyncClient, Client
from headrace.errors import (
    DeadlineExceeded,
    EngineStopped,
    InvalidOption,
    InvalidRequest,
    NotReady,
    QueueFull,
    Unavailable,
    UnknownModel,
    Unreachable,
)
from headrace.frontend.link import ModelFailed
from tests.test_readme import python_blocks
from tests.test_serve import WAIT_S, Server, rings_of

TRANSPORTS = ["ring", "http"]
MANY = 200  # clients, one after the other


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def small_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("small"), "--queue-rows", "4")
    yield server
    assert server.stop() == 0


@pytest.fixture
def mortal_server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait(WAIT_S)


def url_of(server):
    return f"http://{server.address}"


def options(transport, **others):
    return {"timeout": WAIT_S} | others | ({"ring": "off"} if transport == "http" else {})


def inputs_of(ids, rows=1, value=0.0):
    return {"values": np.full((rows, 3), value, np.float32), "ids": np.tile(np.array(ids), (rows, 1))}


@pytest.fixture(params=TRANSPORTS)
def client(request, server):
    with Client(url_of(server), **options(request.param)) as client:
        yield client
        assert client.transport in (None, request.param)


def check(answer, inputs):
    np.testing.assert_array_equal(answer["doubled"], inputs["values"] * 2)
    np.testing.assert_array_equal(answer["sum"], inputs["ids"].sum(1))


def random_inputs(seed):
    generator = np.random.default_rng(seed)
    rows = 1 + seed % 4
    return {
        "values": generator.standard_normal((rows, 3)).astype(np.float32),
        "ids": generator.integers(14, 70, (rows, 4)),
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_transport_is_found_out_and_told(server, transport):
    with Client(url_of(server), **options(transport)) as client:
        assert client.transport is None
        check(client.infer("served", random_inputs(1), version="1", request_id="r", priority=1), random_inputs(1))
        assert client.transport == transport


def test_arrays_and_tensors_of_any_layout_are_taken(client):
    inputs = random_inputs(3)
    check(client.infer("served", {name: torch.from_numpy(array) for name, array in inputs.items()}), inputs)
    check(client.infer("served", {name: np.asfortranarray(array) for name, array in inputs.items()}), inputs)


def test_many_threads_at_once_get_each_their_own_answer(client):
    def ask(seed):
        check(client.infer("served", random_inputs(seed)), random_inputs(seed))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_what_is_submitted_is_answered_later(client):
    futures = [client.submit("served", random_inputs(seed)) for seed in range(8)]
    for seed, future in enumerate(futures):
        check(future.result(WAIT_S), random_inputs(seed))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_tasks_at_once_get_each_their_own_answer(server, transport):
    async def run():
        async with AsyncClient(url_of(server), **options(transport)) as client:

            async def ask(seed):
                check(await client.infer("served", random_inputs(seed)), random_inputs(seed))

            for begin in range(0, 80, 8):
                await asyncio.gather(*(ask(seed) for seed in range(begin, begin + 8)))
            assert client.transport == transport
            assert await client.is_ready()
            assert (await client.metadata("served"))["name"] == "served"
            inputs = random_inputs(3)
            async with client.allocate("served", 4) as call:
                for name, array in inputs.items():
                    call.inputs[name][:] = array
                check(await call.infer(), inputs)
            with pytest.raises(ModelFailed):
                await client.infer("served", inputs_of([13, 0, 0, 0]))

    asyncio.run(run())


def test_inputs_may_be_made_where_the_server_reads_them(client):
    with client.allocate("served", 4) as call:
        for seed in (3, 7):
            for name, array in random_inputs(seed).items():
                call.inputs[name][:] = array
            check(call.infer(), random_inputs(seed))


def test_the_server_is_ready_and_says_what_the_model_takes(client):
    assert client.is_ready()
    metadata = client.metadata("served")
    assert metadata["inputs"][1] == {"name": "ids", "datatype": "INT64", "shape": [-1, 4]}


@pytest.mark.parametrize(
    ("model", "inputs", "others", "error", "words"),
    [
        ("served", {"values": np.zeros((1, 3), np.float32)}, {}, InvalidRequest, "takes"),
        ("served", inputs_of([1, 2, 3]), {}, InvalidRequest, r"shape \[1, 3\]"),
        ("served", inputs_of([1.0, 2, 3, 4]), {}, InvalidRequest, "dtype float64"),
        ("served", inputs_of([1, 2, 3, 4], rows=5), {}, InvalidRequest, "has 5 rows, and the model takes at most 4"),
        ("other", inputs_of([1, 2, 3, 4]), {}, UnknownModel, "there is no model other"),
        ("served", inputs_of([1, 2, 3, 4]), {"version": "9"}, UnknownModel, "no version 9"),
        ("served", inputs_of([1, 2, 3, 4]), {"priority": 2**31}, InvalidRequest, "priority is 2147483648"),
        ("served", inputs_of([13, 0, 0, 0]), {}, ModelFailed, r"thirteen in \(path\)"),
    ],
    ids=["names", "shape", "dtype", "rows", "model", "version", "priority", "raises"],
)
def test_every_refusal_has_its_class(server, model, inputs, others, error, words):
    for transport in TRANSPORTS:
        with Client(url_of(server), **options(transport)) as client, pytest.raises(error, match=words):
            client.infer(model, inputs, **others)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_that_does_not_come_in_time_is_a_deadline_exceeded(server, transport):
    with Client(url_of(server), **options(transport)) as client:
        with pytest.raises(DeadlineExceeded):
            client.infer("served", inputs_of([77, 0, 0, 0]), timeout=0.3)
        server.release()
        check(client.infer("served", random_inputs(2)), random_inputs(2))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_beyond_its_room_a_server_is_full_and_a_patient_client_is_served(small_server, transport):
    with (
        Client(url_of(small_server), **options(transport)) as client,
        Client(url_of(small_server), **options(transport, retries=20)) as patient,
        ThreadPoolExecutor(2) as pool,
    ):
        client.infer("served", random_inputs(0))
        held = pool.submit(client.infer, "served", inputs_of([77, 0, 0, 0], rows=4))
        writer = small_server.gate.open("w")  # opens when the model has it
        with pytest.raises(QueueFull):
            client.infer("served", random_inputs(0), timeout=0.3)
        waiting = pool.submit((client if transport == "ring" else patient).infer, "served", random_inputs(1))
        writer.close()
        held.result(WAIT_S)
        check(waiting.result(WAIT_S), random_inputs(1))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_backend_that_dies_ends_what_it_held_and_the_next_one_serves(small_server, transport):
    with Client(url_of(small_server), **options(transport, retries=30)) as client:
        with Client(url_of(small_server), **options(transport)) as impatient, ThreadPoolExecutor(1) as pool:
            held = pool.submit(impatient.infer, "served", inputs_of([77, 0, 0, 0]))
            writer = small_server.gate.open("w")
            small_server.backend().kill()
            with pytest.raises(EngineStopped, match="ended while it held this request"):
                held.result(WAIT_S)
            writer.close()
            with pytest.raises(NotReady):
                impatient.infer("served", random_inputs(1))
        check(client.infer("served", random_inputs(1)), random_inputs(1))
        while client.transport != transport:  # HTTP fills in until the ring is asked for again
            client.infer("served", random_inputs(1))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_is_killed_leaves_nobody_waiting(mortal_server, transport):
    with Client(url_of(mortal_server), **options(transport)) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.infer, "served", inputs_of([77, 0, 0, 0]))
        writer = mortal_server.gate.open("w")
        mortal_server.process.kill()
        with pytest.raises(Exception, match=r"ended while it held|was lost"):
            held.result(WAIT_S)
        writer.close()
        mortal_server.process.wait(WAIT_S)
        with pytest.raises(Unreachable, match="no server answers"):
            client.infer("served", random_inputs(1))
        assert not client.is_ready()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_stops_answers_what_it_took(mortal_server, transport):
    with Client(url_of(mortal_server), **options(transport)) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.infer, "served", inputs_of([77, 0, 0, 0]))
        writer = mortal_server.gate.open("w")
        mortal_server.process.send_signal(signal.SIGTERM)
        mortal_server.wait_for("stopping")
        writer.close()
        check(held.result(WAIT_S), inputs_of([77, 0, 0, 0]))
        assert mortal_server.process.wait(WAIT_S) == 0
        with pytest.raises(Unavailable):
            client.infer("served", random_inputs(1))


def descriptors_of(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208


def test_clients_that_come_and_go_leave_nothing_behind(small_server):
    supervisor, backend = psutil.Process(small_server.process.pid), small_server.backend()

    def serve_one():
        with Client(url_of(small_server), timeout=WAIT_S) as client:
            client.infer("served", random_inputs(0))
            assert client.transport == "ring"

    serve_one()
    before = descriptors_of(supervisor), descriptors_of(backend)
    for _ in range(MANY):
        serve_one()
    while len(rings_of(backend.pid)) > 2:  # the frontend's, and perhaps the last batch's
        pass
    # One for each client would be hundreds; some come and go, as what is passed on and the last batch's memory.
    assert descriptors_of(supervisor) < before[0] + MANY // 10
    assert descriptors_of(backend) < before[1] + MANY // 10


def test_a_client_that_is_killed_leaves_nothing_behind(small_server):
    program = f"""
        import numpy as np
        from headrace import Client
        client = Client("{url_of(small_server)}")
        client.infer("served", {{"values": np.zeros((1, 3), np.float32), "ids": np.zeros((1, 4), np.int64)}})
        print(client.transport, flush=True)
        client.infer("served", {{"values": np.zeros((1, 3), np.float32), "ids": np.full((1, 4), 77)}})
    """
    backend = small_server.backend()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout.readline() == "ring\n"
        writer = small_server.gate.open("w")
        victim.kill()
    writer.close()
    with Client(url_of(small_server), timeout=WAIT_S) as client:
        check(client.infer("served", random_inputs(1)), random_inputs(1))
    while len(rings_of(backend.pid)) > 2:  # the frontend's, and perhaps the last batch's
        pass


def test_a_socket_at_a_path_serves_a_client_without_a_url_and_off_means_http(tmp_path):
    folder = tmp_path / "on"
    folder.mkdir()
    path = str(tmp_path / "ring.sock")
    server = Server(folder, "--ring-socket", path)
    with Client(ring=path, timeout=WAIT_S) as client:
        check(client.infer("served", random_inputs(1)), random_inputs(1))
        assert client.transport == "ring"
        assert client.is_ready()
    assert server.stop() == 0
    assert not os.path.exists(path)  # noqa: PTH110
    with Client(ring=path) as client:
        assert not client.is_ready()
        with pytest.raises(Unreachable, match=r"ring\.sock"):
            client.infer("served", random_inputs(1))
    folder = tmp_path / "off"
    folder.mkdir()
    server = Server(folder, "--ring-socket", "off")
    with Client(url_of(server), timeout=WAIT_S) as client:
        check(client.infer("served", random_inputs(1)), random_inputs(1))
        assert client.transport == "http"
    assert server.stop() == 0


def test_the_environment_says_where_the_server_is(server, monkeypatch):
    monkeypatch.setenv("HEADRACE_URL", url_of(server))
    with Client(timeout=WAIT_S) as client:
        client.infer("served", random_inputs(1))
        assert client.transport == "ring"
    monkeypatch.setenv("HEADRACE_RING", "off")
    with Client(timeout=WAIT_S) as client:
        client.infer("served", random_inputs(1))
        assert client.transport == "http"


@pytest.mark.parametrize(
    "arguments",
    [{"url": "127.0.0.1:8000"}, {"url": "http://"}, {"url": "http://x:0"}, {"timeout": 0.0}, {"retries": -1}],
    ids=str,
)
def test_arguments_that_cannot_work_are_refused(arguments):
    with pytest.raises(InvalidOption):
        Client(**arguments)


def test_headers_go_with_every_request(tmp_path):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{other.server_port}", headers={"Authorization": "Bearer x"}) as client:
            assert client.is_ready()
        other.shutdown()
        thread.join(WAIT_S)
    assert seen == ["Bearer x"]


IMAGES = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 1000))

def example_inputs():
    return torch.zeros(1, 3, 224, 224)
"""


def test_what_the_readme_tells_a_caller_to_type_works(tmp_path, capsys):
    (block,) = (each for each in python_blocks() if 'infer("resnet18"' in each)
    server = Server(tmp_path, "--name", "resnet18", "--max-batch-size", "8", model=IMAGES)
    assert "http://127.0.0.1:8000" in block
    exec(compile(block.replace("http://127.0.0.1:8000", url_of(server)), "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "(8, 1000) (8, 1000) ring" in printed
    assert server.stop() == 0


def test_importing_the_client_needs_no_torch_and_importing_headrace_no_client():
    program = (
        "import sys, headrace; print('headrace.client' in sys.modules); headrace.Client;"
        " print('torch' in sys.modules, 'aiohttp' in sys.modules, 'urllib3' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert re.split(r"\s+", done.stdout.strip()) == ["False", "False", "False", "False"]
