"""The HTTP front on real sockets: what clients get, what they may not do, and what they can hold up."""

import asyncio
import gzip
import json
import socket
import ssl
import struct
import time
import zlib
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import wraps

import httptools
import pytest
import trustme
import uvloop

from headrace.errors import ModelError
from headrace.frontend.http.answers import Reply, json_reply
from headrace.frontend.http.body import MAX_CHUNKS
from headrace.frontend.http.infer import AMPLE
from headrace.frontend.http.routes import Routes, add_protocol
from headrace.frontend.service import Service
from headrace.frontend_job import AccessSettings
from headrace.tensors import TensorSpec
from tests.frontend.fakes import FakeLink, front_of
from tests.frontend.requests import BINARY, HEADER, JSON, PATH, N, X, binary, chunked, get, post, sized

WAIT_S = 30
SHORT_S = 0.2
LARGE = (TensorSpec(name="x", dtype="uint8", features=(4 << 20,)),)
CERTIFICATES = trustme.CA()


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def error(self):
        return json.loads(self.body)["error"]


class Client:
    """One connection, with answers parsed as they come."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self._found = []
        self._parser = None

    def send(self, data):
        self.writer.write(data)

    async def answer(self):
        """Return the next answer; None where the connection is closed first."""
        while not self._found:
            data = await asyncio.wait_for(self.reader.read(1 << 16), WAIT_S)
            if not data:
                return None
            self._feed(data)
        return self._found.pop(0)

    async def ask(self, data):
        self.send(data)
        return await self.answer()

    async def closed(self):
        """Wait until the server has closed the connection; return what it sent before that."""
        with suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), WAIT_S)
        return b""

    def _feed(self, data):
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(data)

    def on_message_begin(self):
        self._headers, self._body = {}, b""

    def on_header(self, name, value):
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, data):
        self._body += data

    def on_message_complete(self):
        self._found.append(Answer(self._parser.get_status_code(), self._headers, self._body))


@dataclass
class World:
    front: object
    link: FakeLink
    port: int

    async def connect(self, **options):
        return Client(*await asyncio.open_connection("localhost", self.port, **options))

    async def until(self, condition):
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(link=None, access=None, **settings):
    link = link or FakeLink()
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    front = front_of(link, access, **settings)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    await front.start(listener)
    yield World(front, link, port)
    await front.close()
    assert not failures
    assert link.in_flight == 0, "all rows are given back"


def on_loop(test):
    """Run a coroutine as a test, on the loop that the server uses."""

    def run(**given):
        uvloop.run(test(**given))

    return wraps(test)(run)


@on_loop
async def test_a_binary_body_is_answered_with_binary_outputs_and_options_reach_the_backend():
    async with serving() as world:
        client = await world.connect()
        answer = await client.ask(binary())
        size = int(answer.headers["inference-header-content-length"])
        head = json.loads(answer.body[:size])
        assert (answer.status, head["id"], answer.body[size:]) == (200, "a", X + N)
        (asked,) = world.link.asked
        assert asked.priority == 3
        assert asked.deadline_ns > 0


@on_loop
async def test_while_rows_are_ample_a_body_is_received_straight_into_them():
    async with serving() as world:
        client = await world.connect()
        client.send(binary()[:-4])
        await world.until(lambda: bytes(world.link.tensors[0][:12]) == X[:12])
        assert world.link.in_flight == 1, "the rows are leased although the body is not whole"
        assert (await client.ask(binary()[-4:])).status == 200


@on_loop
async def test_while_rows_are_scarce_a_slow_body_holds_none():
    link = FakeLink(rows=4)
    async with serving(link) as world:
        others = [link.admit(1, 0, 0) for _ in range(int(4 * AMPLE) + 1)]
        client, quick = await world.connect(), await world.connect()
        client.send(binary()[:-4])
        assert (await quick.ask(binary())).status == 200, "and by then the slow one has been looked at"
        assert link.in_flight == len(others)
        for other in others:
            other.close()
        assert (await client.ask(binary()[-4:])).body.endswith(X + N)


@on_loop
async def test_a_slow_body_is_given_up_and_its_rows_come_back():
    async with serving(body_timeout_s=SHORT_S) as world:
        client = await world.connect()
        answer = await client.ask(binary()[:-4])
        assert (answer.status, answer.error) == (408, "the body did not come in time")
        assert answer.headers["connection"] == "close"
        assert world.link.in_flight == 0
        await client.closed()


@on_loop
async def test_a_slow_head_is_given_up():
    async with serving(header_timeout_s=SHORT_S) as world:
        client = await world.connect()
        assert (await client.ask(b"GET /v2 HT")).status == 408
        await client.closed()


@on_loop
async def test_silent_connections_are_closed_without_a_word():
    async with serving(header_timeout_s=SHORT_S, idle_timeout_s=SHORT_S) as world:
        new, used = await world.connect(), await world.connect()
        assert (await used.ask(get("/v2"))).status == 200
        assert await new.closed() == b""
        assert await used.closed() == b""


@on_loop
async def test_connections_beyond_the_limit_are_told_so_and_closed():
    async with serving(max_connections=2) as world:
        kept = [await world.connect() for _ in range(2)]
        assert [(await client.ask(get("/v2"))).status for client in kept] == [200, 200]
        refused = await (await world.connect()).answer()
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert "has 2 connections open" in refused.error
        kept[0].writer.close()
        await world.until(lambda: len(world.front._connections) < 2)
        assert (await (await world.connect()).ask(get("/v2"))).status == 200


@on_loop
async def test_connections_are_taken_though_every_round_of_the_event_loop_is_long():
    async with serving() as world:
        clients = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(300)]
        rounds = 0
        while len(world.front._connections) < len(clients):
            rounds += 1
            assert rounds < 20, "one in a round would take 300"
            time.sleep(0.05)  # as when hundreds of connections have work
            await asyncio.sleep(0)
        for client in clients:
            client.close()


@on_loop
async def test_a_body_too_large_is_refused_unread_and_the_client_that_sends_it_all_sees_why():
    async with serving(max_body_bytes=2000) as world:
        client = await world.connect()
        client.send(sized(b"x" * 2001))
        answer = await client.answer()
        assert answer.status == 413
        assert "2001 bytes, and the server takes 2000" in answer.error
        client.send(b"x" * 1_000_000)
        assert await client.closed() == b""


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (chunked(b"x" * 3000, 500), 413, "the chunks of the body have more bytes, and the server takes 2000"),
        (post(b"zz\r\n", "Transfer-Encoding: chunked"), 400, "chunks are no HTTP/1.1"),
        (
            post(b"0\r\n" + b"a: b\r\n" * 6000, "Transfer-Encoding: chunked"),
            400,
            "extensions or trailers without end",
        ),
        (sized(gzip.compress(bytes(10_000)), "Content-Encoding: gzip"), 413, "more than 2000 bytes once"),
        (sized(b"no gzip", "Content-Encoding: gzip"), 400, "the body is no gzip"),
        (sized(gzip.compress(JSON)[:-9], "Content-Encoding: gzip"), 400, "ends too early"),
        (sized(gzip.compress(JSON) + b"x", "Content-Encoding: gzip"), 400, "or something follows it"),
        (sized(JSON, "Content-Encoding: br"), 415, "Content-Encoding br is not taken"),
        (sized(b"[" * 1900), 400, "nested too deeply|no v2 infer request"),
        (sized(b"{}", "Inference-Header-Content-Length: 3"), 400, "must be 0 to the body's 2 bytes"),
        (sized(b"{}", "Inference-Header-Content-Length: -3"), 400, "must be a number of bytes"),
        (sized(b"123", "Inference-Header-Content-Length: 0"), 400, "can fill one input"),
        (sized(JSON, path="/v2/models/other/infer"), 404, "there is no model other"),
        (sized(JSON, path="/v2/models/m/versions/9/infer"), 404, "has no version 9"),
        (get(PATH), 405, "send POST"),
        (get("/v2", method="DELETE"), 405, "send GET or HEAD"),
    ],
)
@on_loop
async def test_bad_bodies_and_paths_are_refused_and_named(data, status, words):
    async with serving(max_body_bytes=2000) as world:
        answer = await (await world.connect()).ask(data)
        assert answer.status == status
        assert any(word in answer.error for word in words.split("|"))


@on_loop
async def test_a_body_of_too_many_chunks_is_refused():
    async with serving() as world:
        client = await world.connect()
        assert (await client.ask(chunked(bytes(MAX_CHUNKS + 10), 1))).status == 413


@on_loop
async def test_after_a_refusal_the_connection_goes_on_with_the_next_request():
    async with serving() as world:
        client = await world.connect()
        assert (await client.ask(sized(bytes(100_000), path="/nothing"))).status == 404
        assert (await client.ask(sized(BINARY + bytes(100_000), HEADER))).status == 400
        other = world.link.admit(8, 0, 0)
        assert (await client.ask(binary())).status == 503
        other.close()
        assert (await client.ask(chunked(JSON, 7))).status == 200
        assert (await client.ask(binary())).status == 200


@on_loop
async def test_a_full_ring_is_told_with_when_to_come_again():
    async with serving(FakeLink(rows=1)) as world:
        answer = await (await world.connect()).ask(sized(JSON))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


@on_loop
async def test_a_client_that_asks_first_is_told_to_go_on_and_only_if_the_body_is_wanted():
    async with serving() as world:
        client = await world.connect()
        asked = binary().replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
        head, body = asked[: asked.index(b"\r\n\r\n") + 4], asked[asked.index(b"\r\n\r\n") + 4 :]
        assert (await client.ask(head)).status == 100
        assert (await client.ask(body)).status == 200
        answer = await client.ask(head.replace(b"/m/", b"/other/"))
        assert (answer.status, answer.headers["connection"]) == (404, "close")


@on_loop
async def test_the_head_alone_is_sent_to_those_that_ask_for_it_and_old_clients_are_understood():
    async with serving() as world:
        client = await world.connect()
        whole = await client.ask(get("/v2"))
        client.send(get("/v2", method="HEAD", version="1.0"))
        head = await client.closed()
        assert f"Content-Length: {len(whole.body)}\r\n".encode() in head
        assert head.endswith(b"Connection: close\r\n\r\n")
        old = await world.connect()
        for _ in range(2):
            answer = await old.ask(get("/v2", "Connection: keep-alive", version="1.0"))
            assert answer.headers["connection"] == "keep-alive"
        assert (await old.ask(get("/v2", "Connection: close"))).headers["connection"] == "close"
        assert await old.closed() == b""


@pytest.mark.parametrize(("name", "undo"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@on_loop
async def test_bodies_and_answers_may_be_compressed(name, undo):
    link = FakeLink(inputs=(TensorSpec(name="x", dtype="uint8", features=(200_000,)),))
    pack = gzip.compress if name == "gzip" else zlib.compress
    async with serving(link) as world:
        data = bytes(range(250)) * 800
        request = sized(
            pack(data),
            "Inference-Header-Content-Length: 0",
            f"Content-Encoding: {name}",
            f"Accept-Encoding: {name}",
        )
        answer = await (await world.connect()).ask(request)
        assert (answer.status, answer.headers["content-encoding"]) == (200, name)
        assert undo(answer.body)[int(answer.headers["inference-header-content-length"]) :] == data


@on_loop
async def test_a_raw_body_fills_the_only_input():
    async with serving(FakeLink(inputs=LARGE)) as world:
        data = bytes(range(256)) * (16 << 10)
        answer = await (await world.connect()).ask(sized(data, "Inference-Header-Content-Length: 0"))
        assert answer.body.endswith(data)


@on_loop
async def test_a_client_that_does_not_read_is_cut_off_and_holds_nothing():
    link = FakeLink(rows=2, inputs=LARGE)
    async with serving(link, body_timeout_s=1.0) as world:
        client = await world.connect(limit=1)
        client.writer.transport.pause_reading()
        client.send(sized(bytes(4 << 20), "Inference-Header-Content-Length: 0"))
        await world.until(lambda: link.asked)
        (stream,) = world.front._connections
        await world.until(lambda: not world.front._connections)
        assert link.in_flight == 0
        assert stream.transport.get_write_buffer_size() <= 5 << 20, "never more than one answer"


@on_loop
async def test_a_client_that_leaves_while_its_request_waits_ends_it():
    link = FakeLink(gate=asyncio.Event())
    async with serving(link) as world:
        client = await world.connect()
        client.send(binary())
        await world.until(lambda: link.asked)
        client.writer.close()
        await world.until(lambda: not world.front._connections)
        assert not link.in_flight


@pytest.mark.parametrize("kind", ["small", "large"])
@on_loop
async def test_clients_that_reset_their_connections_anywhere_leave_nothing(kind):
    link = FakeLink(rows=8, inputs=LARGE) if kind == "large" else FakeLink()
    data = sized(bytes(4 << 20), "Inference-Header-Content-Length: 0") if kind == "large" else binary()
    async with serving(link) as world:
        for number in range(60):
            client = await world.connect()
            client.send(data[: len(data) * number // 50])
            if number % 3:
                await world.until(lambda: world.front._connections)
            ours = client.writer.transport.get_extra_info("socket")
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.writer.transport.abort()
        await world.until(lambda: not world.front._connections)
        assert link.in_flight == 0


@pytest.mark.parametrize("end", ["the server stops", "the version is taken out"])
@on_loop
async def test_a_large_answer_is_sent_though_no_more_requests_are_taken_by_then(end):
    link = FakeLink(inputs=LARGE, gate=asyncio.Event())
    async with serving(link) as world:
        client = await world.connect()
        client.send(sized(bytes(4 << 20), "Inference-Header-Content-Length: 0"))
        await world.until(lambda: link.asked)
        service = world.front._shared.infer._service
        if end == "the server stops":
            service.draining = True
        else:
            service.retire(link)
        link.gate.set()
        answer = await client.answer()
        assert answer.status == 200
        assert answer.body.endswith(bytes(4 << 20))


@on_loop
async def test_at_the_end_what_was_taken_is_answered_and_kept_connections_are_refused():
    link = FakeLink(gate=asyncio.Event())
    async with serving(link) as world:
        client, kept = await world.connect(), await world.connect()
        assert (await kept.ask(get("/v2"))).status == 200
        client.send(binary())
        await world.until(lambda: link.asked)
        world.front._shared.infer._service.draining = True
        world.front.stop_accepting()
        with pytest.raises(OSError, match=r"\w"):
            await world.connect()
        refused = await kept.ask(binary())
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert world.front.in_flight == 1
        link.gate.set()
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        await world.until(lambda: not world.front.in_flight)


@on_loop
async def test_routes_can_be_added_and_their_failures_say_nothing_of_the_inside():
    async def slow(parameters, body):
        await asyncio.sleep(0)
        return json_reply([parameters["name"], body.decode()], 202)

    def refuse(parameters, body):
        raise ModelError("no such model")

    def fail(parameters, body):
        raise KeyError("/srv/secret")

    async with serving() as world:
        routes = world.front.routes
        routes.add("GET", "/page", lambda parameters, body: Reply(200, (("Content-Type", "text/plain"),), b"hello"))
        routes.add("POST", "/load/{name}", slow)
        routes.add("GET", "/refuse", refuse)
        routes.add("GET", "/fail", fail)
        client = await world.connect()
        assert (await client.ask(get("/page?x=1"))).body == b"hello"
        answer = await client.ask(sized(b"{}", path="/load/a%2Fb"))
        assert (answer.status, json.loads(answer.body)) == (202, ["a/b", "{}"])
        assert (await client.ask(get("/refuse"))).status == 400
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        answer = await client.ask(get("/fail"))
        assert (answer.status, answer.error) == (500, "the server failed on this request; its log says why")
        assert [type(error) for error in told] == [KeyError]


@on_loop
async def test_a_token_is_asked_for_by_everything_but_health(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    tokens.chmod(0o600)
    async with serving(access=AccessSettings(token_file=tokens)) as world:
        client = await world.connect()
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await client.ask(get(path))).status == 200
        for data in (binary(), get("/v2"), get("/nothing"), get("/v2", "Authorization: Bearer wrong")):
            answer = await client.ask(data)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "needs a token" in answer.error
        assert not world.link.asked
        assert (await client.ask(sized(BINARY + N + X, HEADER, "Authorization: Bearer secret"))).status == 200


@pytest.mark.parametrize("known", [True, False, None], ids=["right CA", "wrong CA", "no certificate"])
@on_loop
async def test_encrypted_connections_serve_clients_whose_certificate_is_known(tmp_path, known):
    server = CERTIFICATES.issue_cert("localhost")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    CERTIFICATES.cert_pem.write_to_path(tmp_path / "ca.pem")
    access = AccessSettings(
        tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", tls_client_ca=tmp_path / "ca.pem"
    )
    context = ssl.create_default_context()
    CERTIFICATES.configure_trust(context)
    if known is not None:
        (CERTIFICATES if known else trustme.CA()).issue_cert("client@example.org").configure_cert(context)
    link = FakeLink(inputs=LARGE)
    data = bytes(range(256)) * (16 << 10)
    async with serving(link, access) as world:
        if not known:
            with suppress(OSError):  # TLS 1.3 refuses the client's certificate only after its handshake
                client = await world.connect(ssl=context)
                assert await client.ask(get("/v2")) is None
            assert not world.front._connections
            return
        client = await world.connect(ssl=context)
        for _ in range(2):
            answer = await client.ask(sized(data, "Inference-Header-Content-Length: 0"))
            assert answer.body.endswith(data)


@on_loop
async def test_small_answers_are_not_held_back():
    async with serving() as world:
        client = await world.connect()
        assert (await client.ask(get("/v2"))).status == 200
        (stream,) = world.front._connections
        ours = stream.transport.get_extra_info("socket")
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", ["m", "other"]),
        (b"{}", ["m", "other"]),
        (b'{"ready": false}', ["m", "other"]),
        (b'{"ready": true}', ["m"]),
    ],
)
def test_the_index_of_models_tells_all_or_only_those_that_are_ready(body, names):
    service = Service(("m", "other"))
    service.add(FakeLink())
    routes = Routes()
    add_protocol(routes, service, shared_memory=False)
    answer = routes.find("POST", "/v2/repository/index").handler({}, body)
    assert [model["name"] for model in json.loads(answer.body)] == names
