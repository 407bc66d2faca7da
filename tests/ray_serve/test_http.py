"""The ASGI application by itself: bodies in pieces, prefixes, limits, and what is not offered. No cluster is needed."""

import asyncio
import gzip
import json
import struct

import pytest

from headrace.ray_serve.http import HttpV2
from headrace.ray_serve.model import ReplicaModel, described, start_engine
from tests.ray_serve.cluster import MODEL

INFER = "/v2/models/served/infer"
LIMIT = 4096


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "served.py").write_text(MODEL.format(factor=2))
    options = {"name": "served", "device": "cpu", "max_batch_size": 4}
    served = described(f"{folder}/served.py:build", options)
    model = ReplicaModel(served, start_engine(served, lambda _: None))
    yield HttpV2(model, LIMIT)
    model.stop()


class Client:
    """Calls an ASGI application. A body is what its messages carry; None among them is a client that leaves."""

    def __init__(self, app):
        self._app = app

    def call(self, path, *pieces, method=None, headers=None, prefix=""):
        """Return status, headers and body."""
        given = {"content-length": str(sum(map(len, filter(None, pieces)))), **(headers or {})}
        scope = {
            "type": "http",
            "method": method or ("POST" if pieces else "GET"),
            "path": prefix + path,
            "root_path": prefix,
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        last = len(pieces) - 1
        messages = [
            {"type": "http.disconnect"}
            if piece is None
            else {"type": "http.request", "body": piece, "more_body": number < last}
            for number, piece in enumerate(pieces)
        ] or [{"type": "http.request"}]
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        asyncio.run(self._app(scope, receive, send))
        start, body = sent
        told = {name.decode(): value.decode() for name, value in start["headers"]}
        assert told["content-length"] == str(len(body["body"])) or scope["method"] == "HEAD"
        return start["status"], told, body["body"]


@pytest.fixture
def client(app):
    return Client(app)


def request(**more):
    inputs = [
        {"name": "values", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]},
        {"name": "ids", "shape": [1, 4], "datatype": "INT64", "data": [0, 0, 0, 0]},
    ]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "scaled"}], **more}).encode()


def test_a_body_may_come_in_pieces(client):
    body = request()
    status, _, told = client.call(INFER, body[:7], b"", body[7:])
    assert status == 200
    assert json.loads(told)["outputs"][0]["data"] == [2, 4, 6]


def test_paths_begin_behind_the_route_prefix(client):
    assert client.call(INFER, request(), prefix="/other")[0] == 200
    assert client.call("/v2/health/ready", prefix="/other")[0] == 200


def test_a_compressed_body_is_read(client):
    body = gzip.compress(request())
    status, _, told = client.call(INFER, body, headers={"content-encoding": "gzip"})
    assert status == 200
    assert json.loads(told)["outputs"][0]["data"] == [2, 4, 6]


def test_a_binary_output_follows_the_json(client):
    wanted = [{"name": "scaled", "parameters": {"binary_data": True}}]
    _, headers, told = client.call(INFER, request(outputs=wanted))
    at = int(headers["inference-header-content-length"])
    assert headers["content-type"] == "application/octet-stream"
    assert struct.unpack("<3f", told[at:]) == (2, 4, 6)


def test_head_has_no_body(client):
    status, headers, body = client.call("/v2", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("pieces", "headers", "status", "words"),
    [
        ([bytes(LIMIT + 1)], {}, 413, "more than 4096 bytes"),
        ([bytes(LIMIT), b"0"], {"content-length": "1"}, 413, "more than 4096 bytes"),
        ([b"{}"], {"inference-header-content-length": "many"}, 400, "must be a number of bytes"),
        ([b"{}"], {"inference-header-content-length": "9"}, 400, "must be 0 to the body's 2 bytes"),
        ([request(parameters={"priority": 1})], {}, 400, "priority is not offered on Ray"),
        ([b"{"], {"content-encoding": "br"}, 415, "send gzip, deflate or neither"),
    ],
    ids=["too long", "longer than it said", "no length", "a wrong length", "a priority", "an unknown encoding"],
)
def test_what_cannot_be_taken_is_told(client, pieces, headers, status, words):
    told_status, _, told = client.call(INFER, *pieces, headers=headers)
    assert (told_status, words in json.loads(told)["error"]) == (status, True), told


def test_shared_memory_of_the_clients_is_not_offered(client):
    place = {"shared_memory_region": "mine", "shared_memory_byte_size": 12}
    status, _, told = client.call(INFER, request(outputs=[{"name": "scaled", "parameters": place}]))
    assert status == 400
    assert "shared memory of the client's is not offered on Ray" in json.loads(told)["error"]


def test_a_client_that_leaves_while_it_sends_is_not_answered_with_success(client):
    assert client.call(INFER, request()[:5], None)[0] == 499


def test_more_rows_than_the_engine_holds_are_answered_by_and_by(client):
    rows = 30  # of an engine that holds 20
    inputs = [
        {"name": "values", "shape": [rows, 3], "datatype": "FP32", "data": [1, 2, 3] * rows},
        {"name": "ids", "shape": [rows, 4], "datatype": "INT64", "data": [0] * 4 * rows},
    ]
    status, _, told = client.call(INFER, json.dumps({"inputs": inputs, "outputs": [{"name": "scaled"}]}).encode())
    assert status == 200
    assert json.loads(told)["outputs"][0]["data"] == [2, 4, 6] * rows


def test_the_applications_life_follows_the_servers(app):
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    asyncio.run(app({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_stopped_engine_is_told_by_readiness(tmp_path):
    (tmp_path / "served.py").write_text(MODEL.format(factor=2))
    served = described(f"{tmp_path}/served.py:build", {"name": "served", "device": "cpu", "max_batch_size": 2})
    model = ReplicaModel(served, start_engine(served, lambda _: None))
    client = Client(HttpV2(model, LIMIT))
    assert client.call("/v2/health/ready")[0] == 200
    model.stop()
    assert client.call("/v2/health/ready")[0] == 503
    assert client.call("/v2/health/live")[0] == 200
    status, headers, _ = client.call(INFER, request())
    assert (status, headers["retry-after"]) == (503, "1")
