"""The service over HTTP, as the KServe v2 protocol has it: paths to calls, errors to status codes, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from headrace.errors import HeadraceError, InvalidRequest
from headrace.frontend import service as meaning
from headrace.wire import v2

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.service import Service

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RETRY_AFTER_S = 1
JSON = "application/json"


def make_app(service: Service, max_body_bytes: int, body_timeout_s: float) -> web.Application:
    """Return the application.

    Bodies beyond `max_body_bytes` are refused before they are read, and those that take longer than `body_timeout_s` to
    come are given up. Only a whole body gets room in the ring, so a slow client holds up nobody.
    """
    routes = _Routes(service, max_body_bytes, body_timeout_s)
    app = web.Application(middlewares=[_errors], client_max_size=max_body_bytes, handler_args=None)
    model = "/v2/models/{name}"
    for path in (model, model + "/versions/{version}"):
        app.router.add_get(path, routes.model_metadata)
        app.router.add_get(path + "/ready", routes.model_ready)
        app.router.add_get(path + "/config", routes.model_config)
        app.router.add_get(path + "/stats", routes.model_stats)
        app.router.add_post(path + "/infer", routes.infer)
    app.router.add_get("/v2", routes.server_metadata)
    app.router.add_get("/v2/", routes.server_metadata)
    app.router.add_get("/v2/health/live", routes.live)
    app.router.add_get("/v2/health/ready", routes.ready)
    app.router.add_get("/v2/models/stats", routes.model_stats)
    app.router.add_post("/v2/repository/index", routes.repository_index)
    # Asked for by perf_analyzer before it begins, also of servers that offer no shared memory.
    for kind in ("system", "cuda"):
        app.router.add_post(f"/v2/{kind}sharedmemory/unregister", routes.nothing)
        app.router.add_get(f"/v2/{kind}sharedmemory/status", routes.no_regions)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors as the protocol wants them: a status and {"error": text}."""
    try:
        return await handler(request)
    except HeadraceError as error:
        headers = {v2.ERROR_CLASS: type(error).__name__}
        if error.http_status == 503:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        return _error(error.http_status, str(error), headers)
    except web.HTTPRequestEntityTooLarge as error:
        return _error(413, f"the body is larger than the server takes ({error.text})")
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path}: {error.reason}")


class _Routes:
    def __init__(self, service: Service, max_body_bytes: int, body_timeout_s: float) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def server_metadata(self, _: web.Request) -> web.Response:
        return _json(meaning.server_metadata())

    async def live(self, _: web.Request) -> web.Response:
        return web.Response()

    async def ready(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self._service.is_ready() else 503)

    async def model_ready(self, request: web.Request) -> web.Response:
        self._model(request)
        return web.Response()

    async def model_metadata(self, request: web.Request) -> web.Response:
        return _json(meaning.model_metadata(self._model(request)))

    async def model_config(self, request: web.Request) -> web.Response:
        return _json(meaning.model_config(self._model(request)))

    async def model_stats(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", self._service.names[0])
        model = self._service.model(name, request.match_info.get("version"))
        return _json(meaning.model_statistics(model, self._service.totals))

    async def repository_index(self, _: web.Request) -> web.Response:
        return _json(meaning.repository_index(self._service))

    async def nothing(self, _: web.Request) -> web.Response:
        return web.Response()

    async def no_regions(self, _: web.Request) -> web.Response:
        return _json([])

    async def infer(self, request: web.Request) -> web.Response:
        model = self._model(request)
        if request.content_length is not None and request.content_length > self._max_body_bytes:
            return _error(
                413, f"the body has {request.content_length} bytes, and the server takes {self._max_body_bytes}"
            )
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await request.read()
        except TimeoutError:
            return _error(408, f"the body did not come within {self._body_timeout_s:g} s", {"Connection": "close"})
        decoded = v2.decode(body, _header_bytes(request), model.inputs, model.outputs)
        with self._service.call(model.name, model.version, decoded.rows) as call:
            for number, data in enumerate(decoded.inputs):
                call.input(number)[:] = data
            await call.answer()
            named = {spec.name: call.output(number) for number, spec in enumerate(model.outputs)}
            encoded = v2.encode(decoded, model.name, model.version, named, model.outputs)
        if encoded.header_bytes is None:
            return web.Response(body=encoded.body, content_type=JSON)
        headers = {v2.HEADER_LENGTH: str(encoded.header_bytes)}
        return web.Response(body=encoded.body, content_type="application/octet-stream", headers=headers)

    def _model(self, request: web.Request) -> ServedModel:
        return self._service.model(request.match_info["name"], request.match_info.get("version"))


def _header_bytes(request: web.Request) -> int | None:
    given = request.headers.get(v2.HEADER_LENGTH)
    if given is None:
        return None
    if not given.isdecimal() or len(given) > 18:
        raise InvalidRequest(f"{v2.HEADER_LENGTH} is {given[:40]!r}; it must be a number of bytes")
    return int(given)


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=JSON)


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode({"error": text}), content_type=JSON, headers=headers or {}
    )
