"""What happens when things go wrong: a real server, both transports, and the numbers that the promises come with.

Whether something was in time is told by order: an answer has come while the lane is held, or while the next engine is
kept from starting. `--log-cli-level INFO` shows what was measured.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import grpc
import msgspec
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.serving import WAIT_S, Server

ROWS, BATCH = 32, 4  # rows that the frontend holds, rows of a batch
HOLDS, RAISES = 77, 13
MAX_BODY_BYTES = 100_000
AT_ONCE = 300
PATH = "/v2/models/served/infer"
MODEL = f"""
import os
import pathlib
import torch

FOLDER = pathlib.Path(__file__).parent

class Model(torch.nn.Module):
    def forward(self, ids):
        with (FOLDER / "ran").open("a") as ran:
            print(*ids[:, 0].tolist(), file=ran)
        if (ids == {RAISES}).any():
            raise ValueError("thirteen")
        if (ids == {HOLDS}).any():  # until somebody opens the other end and closes it
            with open(os.environ["GATE"]) as gate:
                gate.read()
        return {{"next": ids + 1}}

def build():
    if (FOLDER / "start").exists():
        (FOLDER / "start").read_text()  # the same
    return Model()

def example_inputs():
    return {{"ids": torch.zeros(2, 4, dtype=torch.int64)}}
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a client was told, and when: the first value of the output, or the reason why there is none."""

    status: str
    value: int | None = None
    text: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    at_s: float = field(default_factory=time.monotonic)


class Http:
    """Ways to ask for one row that begins with a number."""

    full, failed, late, gone, invalid = "503", "500", "504", "503", "400"

    @staticmethod
    def ask(server, number, **parameters):
        status, headers, body = server.call(PATH, msgspec.json.encode(Http.request(number, parameters)))
        told = msgspec.json.decode(body)
        if status == 200:
            return Answer("200", told["outputs"][0]["data"][0])
        return Answer(str(status), text=told["error"], headers=headers)

    @staticmethod
    def request(number, parameters=None, **changes):
        given = {"name": "ids", "shape": [1, 4], "datatype": "INT64", "data": [number, 0, 0, 0]} | changes
        return {"inputs": [given], "parameters": parameters or {}}

    @staticmethod
    def ask_and_leave(server, number):
        """Send a request, and return what closes the connection."""
        body = msgspec.json.encode(Http.request(number))
        connection = connect(server)
        connection.sendall(head_of(len(body)) + body)
        return connection.close


class Grpc:
    """The same over gRPC."""

    full, failed, late, gone, invalid = (
        "UNAVAILABLE",
        "INTERNAL",
        "DEADLINE_EXCEEDED",
        "UNAVAILABLE",
        "INVALID_ARGUMENT",
    )

    @staticmethod
    def ask(server, number, **parameters):
        return Grpc.answer(server, Grpc.request(number, parameters))

    @staticmethod
    def answer(server, request):
        try:
            told = stub_of(server).ModelInfer(request, timeout=WAIT_S)
        except grpc.RpcError as error:
            return Answer(error.code().name, text=error.details())
        return Answer("200", int.from_bytes(told.raw_output_contents[0][:8], "little"))

    @staticmethod
    def request(number, parameters=None, *, shape=(1, 4), datatype="INT64"):
        request = pb.ModelInferRequest(model_name="served")
        request.inputs.add(name="ids", datatype=datatype, shape=shape)
        request.raw_input_contents.append(number.to_bytes(8, "little") + bytes(24))
        for name, value in (parameters or {}).items():
            request.parameters[name].int64_param = value
        return request

    @staticmethod
    def ask_and_leave(server, number):
        return stub_of(server).ModelInfer.future(Grpc.request(number)).cancel


WAYS = [Http, Grpc]
both = pytest.mark.parametrize("way", WAYS, ids=["HTTP", "gRPC"])


def head_of(body_bytes):
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {body_bytes}\r\n\r\n".encode()


def connect(server):
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def stub_of(server):
    return service_pb2_grpc.GRPCInferenceServiceStub(server.channel)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--num-workers", "1", "--lane-depth", "1", "--max-body-bytes", str(MAX_BODY_BYTES))
    server = Server(tmp_path_factory.mktemp("server"), "--queue-rows", str(ROWS), *options, model=MODEL)
    with grpc.insecure_channel(server.grpc_address) as server.channel:
        yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        yield pool


_numbers = count(1000)


def new_numbers(how_many):
    """Return numbers that no other request has."""
    return [next(_numbers) for _ in range(how_many)]


def ran(server):
    """Return the batches that the model has seen, as the numbers of their rows."""
    return [[int(word) for word in line.split()] for line in server.gate.with_name("ran").read_text().splitlines()]


def until(reached):
    limit = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < limit


def in_flight(server):
    """Return how many requests have rows, as of a quarter of a second ago at most."""
    lines = server.call("/metrics")[2].decode().splitlines()
    return sum(int(line.rpartition(" ")[2]) for line in lines if line.startswith("headrace_requests_in_flight{"))


@contextmanager
def lane_held(server, pool):
    """Keep the only lane busy: whatever comes meanwhile waits for it."""
    held = pool.submit(Http.ask, server, HOLDS)
    try:
        with server.gate.open("w"):  # opens when the model has it
            yield
    finally:
        answer = held.result(WAIT_S)
    assert answer.value == HOLDS + 1


@contextmanager
def start_held(server):
    """Keep the next backend from becoming ready."""
    gate = server.gate.with_name("start")
    os.mkfifo(gate)
    try:
        yield
        gate.open("w").close()  # opens when the backend is there
    finally:
        gate.unlink()


def test_what_a_killed_backend_held_is_told_why_at_once_and_the_server_is_not_ready_until_the_next_one_is(server, pool):
    with start_held(server):
        asked = [pool.submit(Http.ask, server, HOLDS)]
        with server.gate.open("w"):
            asked += [pool.submit(way.ask, server, number) for way, number in zip(WAYS, new_numbers(2), strict=True)]
            until(lambda: in_flight(server) == 3)
            backend = server.backend()
            killed_s = time.monotonic()
            backend.kill()
            answers = [future.result(WAIT_S) for future in asked]
        assert [answer.status for answer in answers] == [Http.gone, Http.gone, Grpc.gone]
        for answer in answers:
            assert "the backend ended while it held this request; send it again" in answer.text
        (number,) = new_numbers(1)
        for way in WAYS:
            answer = way.ask(server, number)
            assert answer.status == way.gone
            assert "served is not ready: " in answer.text
        assert server.call("/v2/health/ready")[0] == 503
        assert server.call("/v2/models/served/ready")[0] == 503
        assert server.call("/v2/health/live")[0] == 200
        assert not stub_of(server).ServerReady(pb.ServerReadyRequest()).ready
        assert not stub_of(server).ModelReady(pb.ModelReadyRequest(name="served")).ready
        assert stub_of(server).ServerLive(pb.ServerLiveRequest()).live
    until(server.is_ready)
    ready_s = time.monotonic()
    assert [way.ask(server, number).value for way in WAYS] == [number + 1, number + 1]
    last_s = max(answer.at_s for answer in answers)
    _log.info("backend killed: all told after %.1f ms", (last_s - killed_s) * 1000)
    _log.info("backend killed: ready again after %.2f s", ready_s - killed_s)


def test_a_backend_that_is_killed_before_it_knows_of_a_new_frontend_is_missed_by_it_all_the_same(server, pool):
    backend = server.backend()
    backend.suspend()
    server.frontend().kill()
    server.wait_for("is started anew")
    until(server.is_ready)
    asked = pool.submit(Http.ask, server, *new_numbers(1))
    until(lambda: in_flight(server) == 1)
    backend.kill()
    answer = asked.result(WAIT_S)
    assert answer.status == Http.gone
    assert "the backend ended while it held this request" in answer.text
    server.wait_for("ready again")
    until(server.is_ready)


@both
def test_a_bad_row_fails_alone_though_it_was_in_a_batch_with_others(server, pool, way):
    good = new_numbers(BATCH - 1)
    with lane_held(server, pool):
        bad = pool.submit(way.ask, server, RAISES)
        others = [pool.submit(each.ask, server, number) for each, number in zip([*WAYS, way], good, strict=True)]
        until(lambda: in_flight(server) == 1 + BATCH)
    assert [future.result(WAIT_S).value for future in others] == [number + 1 for number in good]
    assert bad.result(WAIT_S).status == way.failed
    assert "ValueError: thirteen" in bad.result().text
    assert sorted([RAISES, *good]) in map(sorted, ran(server))
    _log.info("one bad row in a batch of %d: 1 failed", BATCH)


@both
def test_of_six_clients_that_leave_before_their_turn_nothing_is_computed_and_no_row_is_held(server, pool, way):
    numbers = new_numbers(6)
    with lane_held(server, pool):
        leave = [way.ask_and_leave(server, number) for number in numbers]
        until(lambda: in_flight(server) == 7)
        left_s = time.monotonic()
        for each in leave:
            each()
        until(lambda: in_flight(server) == 1)
        freed_s = time.monotonic()
    (last,) = new_numbers(1)
    assert way.ask(server, last).value == last + 1
    computed = {number for batch in ran(server) for number in batch}
    assert last in computed
    assert not computed & set(numbers)
    _log.info("6 clients left: 0 were computed, all rows seen free within %.0f ms", (freed_s - left_s) * 1000)


@both
def test_of_300_at_once_those_beyond_the_room_are_refused_while_the_others_wait(server, pool, way):
    numbers = new_numbers(AT_ONCE)
    with lane_held(server, pool):
        room = ROWS - 1
        began_s = time.monotonic()
        asked = {pool.submit(way.ask, server, number): number for number in numbers}
        ended = as_completed(asked, WAIT_S)
        refused = [next(ended) for _ in range(AT_ONCE - room)]
        for future in refused:
            assert future.result().status == way.full
            assert "no 1 rows are free: try again" in future.result().text
        if way is Http:
            assert {future.result().headers["Retry-After"] for future in refused} == {"1"}
        until(lambda: in_flight(server) == ROWS)
        waiting = asked.keys() - set(refused)
        assert not any(future.done() for future in waiting)
        last_s = max(future.result().at_s for future in refused)
    assert all(future.result(WAIT_S).value == asked[future] + 1 for future in waiting)
    _log.info("%d at once: %d refused within %.0f ms", AT_ONCE, len(refused), (last_s - began_s) * 1000)


HTTP_MISTAKES = {
    "no JSON": (b'{"inputs": [}', ["JSON is malformed", "byte 12"]),
    "no inputs": (b"{}", ["missing required field `inputs`"]),
    "kind of field": (b'{"inputs": 5}', ["Expected `array`, got `int`", "`$.inputs`"]),
    "shape": (Http.request(1, shape=[1, 5]), ["input ids has shape [1, 5]", "takes [rows, 4]"]),
    "rows": (Http.request(1, shape=[5, 4], data=[0] * 20), ["has 5 rows", "at most 4"]),
    "datatype": (Http.request(1, datatype="FP32"), ["input ids has datatype FP32", "takes INT64"]),
    "name": (Http.request(1, name="x"), ["inputs x were given", "takes ids"]),
    "values": (Http.request(1, data=[1, 2, 3]), ["input ids has 3 values", "[1, 4] needs 4"]),
    "timeout": (Http.request(1, {"timeout": -1}), ["timeout is -1", "from 0 to 9007199254740"]),
    "priority": (Http.request(1, {"priority": "high"}), ["priority is 'high'", "from 0 to 2147483647"]),
}


@pytest.mark.parametrize(("body", "words"), HTTP_MISTAKES.values(), ids=HTTP_MISTAKES.keys())
def test_a_mistake_is_told_with_field_value_and_limit(server, body, words):
    status, _, told = server.call(PATH, body)
    assert status == 400
    text = msgspec.json.decode(told)["error"]
    assert [word for word in words if word not in text] == []


GRPC_MISTAKES = {
    "shape": (Grpc.request(1, shape=[1, 5]), ["input ids has shape [1, 5]", "takes [rows, 4]"]),
    "datatype": (Grpc.request(1, datatype="FP32"), ["input ids has datatype FP32", "takes INT64"]),
    "bytes": (Grpc.request(1, shape=[2, 4]), ["input ids has 32 bytes", "needs 64"]),
    "timeout": (Grpc.request(1, {"timeout": -1}), ["timeout is -1", "at least 0"]),
    "priority": (Grpc.request(1, {"priority": 2**31}), ["priority is 2147483648", "from 0 to 2147483647"]),
}


@pytest.mark.parametrize(("request_", "words"), GRPC_MISTAKES.values(), ids=GRPC_MISTAKES.keys())
def test_a_mistake_over_grpc_is_told_with_field_value_and_limit(server, request_, words):
    answer = Grpc.answer(server, request_)
    assert answer.status == Grpc.invalid
    assert [word for word in words if word not in answer.text] == []


def test_a_body_of_50_mb_is_refused_before_any_of_it_has_come(server):
    with connect(server) as connection:
        began_s = time.monotonic()
        connection.sendall(head_of(50_000_000))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        ended_s = time.monotonic()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"50000000 bytes, and the server takes 100000" in answer
    _log.info("50 MB announced: refused after %.1f ms and 0 bytes of it", (ended_s - began_s) * 1000)


@both
def test_a_deadline_that_passes_while_a_request_waits_is_told_though_the_lane_is_held(server, pool, way):
    late, patient = new_numbers(2)
    with lane_held(server, pool):
        waiting = pool.submit(way.ask, server, patient)
        began_s = time.monotonic()
        answer = way.ask(server, late, timeout=200_000)
        assert not waiting.done()
    assert answer.status == way.late
    assert "longer than its deadline allows" in answer.text
    assert answer.at_s - began_s >= 0.2
    assert waiting.result(WAIT_S).value == patient + 1
    assert [late] not in ran(server)
    _log.info("deadline of 200 ms: told %.1f ms after it", (answer.at_s - began_s - 0.2) * 1000)


@both
def test_priority_1_overtakes_what_came_before_and_nobody_else_does(server, pool, way):
    first, second, third, fourth, urgent = new_numbers(5)
    with lane_held(server, pool):
        asked = []
        for number in (first, second, third, fourth):
            asked.append(pool.submit(way.ask, server, number))
            until(lambda: in_flight(server) == 1 + len(asked))
        asked.append(pool.submit(way.ask, server, urgent, priority=1))
        until(lambda: in_flight(server) == 6)
    assert all(future.result(WAIT_S).status == "200" for future in asked)
    assert ran(server)[-2:] == [[urgent, first, second, third], [fourth]]
