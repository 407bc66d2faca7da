"""The small calls: a method and a path to a handler. Others may be added at any time."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

import msgspec

from headrace.errors import InvalidRequest
from headrace.frontend import service as meaning
from headrace.frontend.http.answers import Reply, json_reply
from headrace.frontend.http.head import Refused
from headrace.frontend.observe import PATHS

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.observe import Observer
    from headrace.frontend.service import Service

Parameters = Mapping[str, str]  # a pattern's {names}, percent-decoded
Handler = Callable[[Parameters, bytes], Reply | Awaitable[Reply]]
HEALTH = ("/v2/health/live", "/v2/health/ready")  # for probes, which have no token
MODEL = "/v2/models/{name}"
VERSION = MODEL + "/versions/{version}"


@dataclass(frozen=True, slots=True)
class Match:
    handler: Handler
    parameters: Parameters


@dataclass(slots=True)
class _Route:
    pattern: re.Pattern[str]
    handlers: dict[str, Handler]  # by method


@dataclass(slots=True)
class Routes:
    """A handler gets the pattern's parameters and the whole body, and may raise any HeadraceError."""

    _routes: dict[str, _Route] = field(default_factory=dict)

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Answer `method` on paths of the pattern, in which {name} stands for one segment. GET answers HEAD too.

        Of several patterns that fit a path, the first added is meant.
        """
        parts = re.split(r"\{(\w+)\}", pattern)
        regex = "".join(f"(?P<{part}>[^/]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
        route = self._routes.setdefault(pattern, _Route(re.compile(regex), {}))
        route.handlers[method] = handler

    def find(self, method: str, path: str) -> Match:
        """Return who answers. Raises Refused 404, or 405 where only other methods are answered."""
        allowed: set[str] = set()
        for route in self._routes.values():
            found = route.pattern.fullmatch(path)
            if found is None:
                continue
            handler = route.handlers.get("GET" if method == "HEAD" else method)
            if handler is not None:
                return Match(handler, {name: unquote(value) for name, value in found.groupdict().items()})
            allowed.update(route.handlers)
        if allowed:
            raise method_not_allowed(method, path, allowed)
        raise Refused(404, f"{method} {path[:200]}: Not Found")


def method_not_allowed(method: str, path: str, allowed: set[str]) -> Refused:
    words = sorted(allowed | ({"HEAD"} if "GET" in allowed else set()))
    text = f"{method} {path[:200]}: Method Not Allowed; send {' or '.join(words)}"
    return Refused(405, text, (("Allow", ", ".join(words)),))


def add_protocol(routes: Routes, service: Service, *, shared_memory: bool) -> None:
    """Add the KServe v2 protocol's small calls; `shared_memory`: clients may name regions."""
    told = _Told(service, shared_memory)
    routes.add("GET", "/v2/models/stats", told.all_statistics)  # before a model of that name
    for model in (MODEL, VERSION):
        routes.add("GET", model, told.model_metadata)
        routes.add("GET", model + "/ready", told.model_ready)
        routes.add("GET", model + "/config", told.model_config)
        routes.add("GET", model + "/stats", told.model_statistics)
    for path in ("/v2", "/v2/"):
        routes.add("GET", path, told.server_metadata)
    routes.add("GET", HEALTH[0], told.nothing)
    routes.add("GET", HEALTH[1], told.ready)
    routes.add("POST", "/v2/repository/index", told.repository_index)
    routes.add("POST", "/v2/repository/models/{name}/load", told.load)
    routes.add("POST", "/v2/repository/models/{name}/unload", told.unload)


def add_pages(routes: Routes, observer: Observer) -> None:
    """Add the live page, and /metrics."""

    def added(path: str) -> Handler:
        async def page(_parameters: Parameters, _body: bytes) -> Reply:
            told = await observer.reply(path)
            return Reply(200, tuple(told.headers.items()), told.body)

        return page

    for path in PATHS:
        routes.add("GET", path, added(path))


class _ControlBody(msgspec.Struct):
    parameters: dict[str, object] = {}


class _IndexBody(msgspec.Struct):
    ready: bool = False  # only versions that are


BodyT = TypeVar("BodyT", bound=msgspec.Struct)


def read_json(body: bytes, kind: type[BodyT], name: str) -> BodyT:
    """Read a body of a small call; none at all is as good as {}. Raises InvalidRequest, naming the field."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is no {name} request: {error}") from error


class _Told:
    """What the service means, as replies."""

    def __init__(self, service: Service, shared_memory: bool) -> None:
        self._service = service
        self._shared_memory = shared_memory

    def server_metadata(self, _parameters: Parameters, _body: bytes) -> Reply:
        return json_reply(meaning.server_metadata(shared_memory=self._shared_memory))

    def nothing(self, _parameters: Parameters, _body: bytes) -> Reply:
        return Reply()

    def ready(self, _parameters: Parameters, _body: bytes) -> Reply:
        return Reply(200 if self._service.is_ready() else 503)

    def model_ready(self, parameters: Parameters, _body: bytes) -> Reply:
        self._model(parameters)
        return Reply()

    def model_metadata(self, parameters: Parameters, _body: bytes) -> Reply:
        model = self._model(parameters)
        return json_reply(meaning.model_metadata(model, self._service.versions(model.name)))

    def model_config(self, parameters: Parameters, _body: bytes) -> Reply:
        return json_reply(meaning.model_config(self._model(parameters)))

    def model_statistics(self, parameters: Parameters, _body: bytes) -> Reply:
        return json_reply(meaning.model_statistics(self._model(parameters), self._service.totals))

    def all_statistics(self, _parameters: Parameters, _body: bytes) -> Reply:
        return json_reply(meaning.all_statistics(self._service.totals))

    def repository_index(self, _parameters: Parameters, body: bytes) -> Reply:
        asked = read_json(body, _IndexBody, "repository index")
        return json_reply(meaning.repository_index(self._service, only_ready=asked.ready))

    async def load(self, parameters: Parameters, body: bytes) -> Reply:
        await self._service.load(parameters["name"], read_json(body, _ControlBody, "load or unload").parameters)
        return Reply()

    async def unload(self, parameters: Parameters, body: bytes) -> Reply:
        await self._service.unload(parameters["name"], read_json(body, _ControlBody, "load or unload").parameters)
        return Reply()

    def _model(self, parameters: Parameters) -> ServedModel:
        return self._service.model(parameters["name"], parameters.get("version"))
