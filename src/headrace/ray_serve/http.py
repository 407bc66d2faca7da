"""KServe v2 over HTTP as an ASGI application, for Serve's proxies and for servers inside the replicas alike.

Source: ASGI 3.0, "HTTP & WebSocket ASGI Message Format".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from headrace.errors import Cancelled, HeadraceError, Unavailable
from headrace.frontend import service as meaning
from headrace.frontend.http import compression
from headrace.frontend.http.answers import JSON, Reply, encoded, error_reply, json_reply, reply_of
from headrace.frontend.http.head import Refused, header_number
from headrace.frontend.http.infer import BINARY
from headrace.frontend.http.routes import HEALTH, MODEL, VERSION, Parameters, Routes, method_not_allowed
from headrace.ray_serve import answering
from headrace.wire import v2

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.ray_serve.model import ReplicaModel

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_log = logging.getLogger(__name__)


class HttpV2:
    """The application. Paths begin where the application's route prefix ends."""

    def __init__(self, model: ReplicaModel, max_body_bytes: int) -> None:
        self._model = model
        self._max_body_bytes = max_body_bytes
        self._routes = Routes()
        _add_small_calls(self._routes, model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await _send(await self._reply(scope, receive), send, scope["method"])
        else:
            await send({"type": "websocket.close"})

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            reply = await self._answer(scope["method"], _path(scope), headers, receive)
            accept = headers.get("accept-encoding")
            return reply if accept is None else await encoded(reply, accept)
        except HeadraceError as error:
            return reply_of(error)
        except Exception:  # noqa: BLE001  our own bug, and the client is told that it is
            _log.exception("a request failed")
            return error_reply(500, "the replica failed on this request, and says why in its log")

    async def _answer(self, method: str, path: str, headers: Mapping[str, str], receive: Receive) -> Reply:
        found = _INFER.fullmatch(path)
        if found is None:
            match = self._routes.find(method, path)
            reply = match.handler(match.parameters, b"")
            return reply if isinstance(reply, Reply) else await reply
        if method != "POST":
            raise method_not_allowed(method, path, {"POST"})
        model = self._model.find(*found.groups())
        return await self._infer(model, dict(headers), receive)

    async def _infer(self, model: ServedModel, headers: dict[str, str], receive: Receive) -> Reply:
        header_bytes = header_number(headers, v2.HEADER_LENGTH)
        body = await _body(headers, receive, self._max_body_bytes)
        encoding = headers.get("content-encoding", "").lower()
        data = await compression.decompressed(body, encoding, self._max_body_bytes)
        size = v2.json_bytes(header_bytes, len(data))
        tail = data[size:]
        if header_bytes == 0:
            request = v2.decode_raw(len(tail), model.inputs, model.outputs)
        else:
            request = v2.decode(data[:size], len(tail), model.inputs, model.outputs)
        regions = bool(request.regions) or any(wanted.place for wanted in request.outputs)
        answering.require_offered(regions=regions, priority=request.priority)
        given = request.gather(tail)
        inputs = [given[number] for number in range(len(model.inputs))]
        outputs = await answering.infer(self._model, inputs, request.rows, request.timeout_us)
        by_name = {spec.name: output for spec, output in zip(model.outputs, outputs, strict=True)}
        answer = v2.encode(request, model.name, model.version, by_name, model.outputs)
        kind = (BINARY, (v2.HEADER_LENGTH, str(len(answer.json)))) if answer.tensors else (JSON,)
        return Reply(200, kind, answer.json, answer.tensors)


def _add_small_calls(routes: Routes, model: ReplicaModel) -> None:
    def found(parameters: Parameters) -> ServedModel:
        return model.find(parameters["name"], parameters.get("version"))

    def nothing(parameters: Parameters, _body: bytes) -> Reply:
        found(parameters)
        return Reply()

    def ready(_parameters: Parameters, _body: bytes) -> Reply:
        return _ready(model)

    for path in (MODEL, VERSION):
        routes.add("GET", path, lambda parameters, _: json_reply(meaning.model_metadata(found(parameters))))
        routes.add("GET", path + "/config", lambda parameters, _: json_reply(meaning.model_config(found(parameters))))
        routes.add("GET", path + "/ready", nothing)
    for path in ("/v2", "/v2/"):
        routes.add("GET", path, lambda _parameters, _body: json_reply(answering.server_metadata()))
    routes.add("GET", HEALTH[0], lambda _parameters, _body: Reply())
    routes.add("GET", HEALTH[1], ready)


def _ready(model: ReplicaModel) -> Reply:
    try:
        model.engine.check()
    except Unavailable:
        return Reply(503)
    return Reply()


def _path(scope: Scope) -> str:
    """Return the path behind the route prefix, which ASGI calls root_path and leaves in the path."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if prefix != "/" else path


async def _body(headers: Mapping[str, str], receive: Receive, limit: int) -> memoryview:
    """Return a request's body. Raises Refused 413 before a body is read that says it is too large, and Cancelled."""
    length = headers.get("content-length", "0")
    too_large = Refused(413, f"the body has more than {limit} bytes, the limit; send less at once")
    if length.isdecimal() and int(length[:19]) > limit:
        raise too_large
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("its client left before the request had come")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))


async def _send(reply: Reply, send: Send, method: str) -> None:
    """Send the reply as one body: Serve's proxies pickle each message, and views cannot be."""
    headers = [*reply.headers, ("Content-Length", str(reply.size))]
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else reply.copied().body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
