"""The infer call: a binary body's tensors go from the socket into the ring's rows, and the answer's from there out.

That holds rows for as long as the client takes. So it is done only while at least half of the ring's rows are free;
beyond, bodies are received into memory of our own and answers copied out first, and slow clients hold up nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from headrace.clock import now_ns
from headrace.errors import InvalidRequest
from headrace.frontend.http import compression
from headrace.frontend.http.answers import COPY_BYTES, JSON, Reply, encoded
from headrace.frontend.http.head import header_number
from headrace.frontend.http.routes import method_not_allowed
from headrace.frontend.service import InferOptions
from headrace.wire import v2
from headrace.wire.elements import least_bytes, place, raw

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.http.connection import Exchange
    from headrace.frontend.link import Call
    from headrace.frontend.regions import Regions, Window
    from headrace.frontend.service import Service

BINARY = ("Content-Type", "application/octet-stream")
AMPLE = 0.5  # share of free rows from which on clients may hold some while bytes cross the network
_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model as a path names it; no version: the newest."""

    name: str
    version: str | None


class Infer:
    """POST .../infer."""

    def __init__(self, service: Service, regions: Regions, max_body_bytes: int) -> None:
        self._service = service
        self._regions = regions
        self._max_body_bytes = max_body_bytes

    def wanted(self, method: str, path: str) -> Wanted | None:
        """Return the model asked for; None if the path is of another call. Raises Refused, UnknownModel, NotReady."""
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        if method != "POST":
            raise method_not_allowed(method, path, {"POST"})
        name, version = found.groups()
        wanted = Wanted(unquote(name), version and unquote(version))
        self._model(wanted)
        return wanted

    def route(self, method: str, path: str) -> str | None:
        """Return the pattern of an infer call's path, for people; None if it is another call."""
        found = _PATH.fullmatch(path) if method == "POST" else None
        if found is None:
            return None
        return "/v2/models/{name}/infer" if found[2] is None else "/v2/models/{name}/versions/{version}/infer"

    def _model(self, wanted: Wanted) -> ServedModel:
        """Return who answers now: asked again after every wait, for the newest version may have changed meanwhile."""
        return self._service.model(wanted.name, wanted.version)

    async def answer(self, wanted: Wanted, exchange: Exchange) -> None:
        """Receive a request's body, have it computed, and send the answer. Raises any HeadraceError before that."""
        headers, body = exchange.head.headers, exchange.body
        header_bytes = header_number(headers, v2.HEADER_LENGTH)
        encoding = headers.get("content-encoding", "").lower()
        if body.is_chunked or encoding or header_bytes is None:
            data = await compression.decompressed(await body.read(), encoding, self._max_body_bytes)
            size = v2.json_bytes(header_bytes, len(data))
            model = self._model(wanted)
            request = self._decoded(data[:size], len(data) - size, header_bytes, model)
            await self._copied(model, request, data[size:], exchange)
            return
        json = memoryview(bytearray(v2.json_bytes(header_bytes, body.remaining)))
        await body.fill(json)
        model = self._model(wanted)
        request = self._decoded(json, body.remaining, header_bytes, model)
        fixed = not any(spec.is_bytes for spec in model.inputs)  # others cannot be received into rows as they come
        if fixed and self._service.free_share(model.name, model.version) >= AMPLE:
            await self._straight(model, request, exchange)
            return
        tail = await body.read()
        model = self._model(wanted)
        await self._copied(model, self._decoded(json, len(tail), header_bytes, model), tail, exchange)

    def _decoded(
        self, json: memoryview, tail_bytes: int, header_bytes: int | None, model: ServedModel
    ) -> v2.InferRequest:
        began_ns = now_ns()
        try:
            if header_bytes == 0:
                return v2.decode_raw(tail_bytes, model.inputs, model.outputs)
            return v2.decode(json, tail_bytes, model.inputs, model.outputs)
        except InvalidRequest as error:
            self._service.refused(model.name, error, began_ns)
            raise

    async def _straight(self, model: ServedModel, request: v2.InferRequest, exchange: Exchange) -> None:
        with self._service.call(model.name, model.version, request.rows, _options(request, exchange)) as call:
            windows = self._open_regions(model, request, call)
            for number, data in request.inline.items():
                call.input(number)[:] = data
            for number in request.binary:
                await exchange.body.fill(call.input(number))
            reply = await self._computed(model, request, call, windows, exchange)
        await exchange.send(reply)

    async def _copied(self, model: ServedModel, request: v2.InferRequest, tail: memoryview, exchange: Exchange) -> None:
        with self._service.call(model.name, model.version, request.rows, _options(request, exchange)) as call:
            windows = self._open_regions(model, request, call)
            for number, data in request.gather(tail).items():
                place(call.input(number), data, model.inputs[number])
            reply = await self._computed(model, request, call, windows, exchange)
        await exchange.send(reply)

    def _open_regions(self, model: ServedModel, request: v2.InferRequest, call: Call) -> dict[str, Window]:
        """Read the inputs that lie in regions; return where outputs go, by name. Raises InvalidRequest, NotOffered."""
        windows = {}
        for wanted in request.outputs:
            if wanted.place is not None:
                spec = next(spec for spec in model.outputs if spec.name == wanted.name)
                windows[wanted.name] = self._regions.output(wanted.place, least_bytes(spec, request.rows))
        for number, region in request.regions.items():
            self._regions.read_tensor(region, call.input(number), model.inputs[number])
        return windows

    async def _computed(
        self,
        model: ServedModel,
        request: v2.InferRequest,
        call: Call,
        windows: Mapping[str, Window],
        exchange: Exchange,
    ) -> Reply | None:
        """Await the answer; send it from the rows where it is large and they are ample, else return it, copied."""
        await call.answer()
        outputs = {spec.name: raw(call.output(number), spec) for number, spec in enumerate(model.outputs)}
        for name, window in windows.items():
            window.write(outputs[name])
        answer = v2.encode(request, model.name, model.version, outputs, model.outputs)
        headers = (BINARY, (v2.HEADER_LENGTH, str(len(answer.json)))) if answer.tensors else (JSON,)
        reply = Reply(200, headers, answer.json, answer.tensors)
        accept = exchange.head.headers.get("accept-encoding")
        if accept is not None:
            reply = await encoded(reply, accept)
        if reply.size <= COPY_BYTES or call.free_share < AMPLE:
            return reply.copied()
        await exchange.send(reply)
        return None


def _options(request: v2.InferRequest, exchange: Exchange) -> InferOptions:
    return InferOptions(timeout_us=request.timeout_us, priority=request.priority, trace=exchange.trace)
