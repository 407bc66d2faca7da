"""A client's requests over HTTP: the KServe v2 protocol with binary tensors, so any server of it will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np

from headrace.client.arrays import Array, as_output, as_rows, require_fixed_size
from headrace.client.failures import NotTaken, of_status, retry_after_s
from headrace.client.senders import HttpAnswer, HttpCall
from headrace.errors import InvalidRequest, TransportFailed
from headrace.wire.datatypes import numpy_dtype
from headrace.wire.v2 import ERROR_CLASS, HEADER_LENGTH
from headrace.wire.v2_call import CallOptions, Output, Tensors, decode_answer, decode_metadata, encode_call, error_text

if TYPE_CHECKING:
    from headrace.client.request import Sent
    from headrace.client.senders import Sender

JSON = "application/json"


class HttpTransport:
    """Requests to one server."""

    def __init__(self, url: str, headers: Mapping[str, str], sender: Sender) -> None:
        self._prefix = urlsplit(url).path.rstrip("/")
        self._headers = dict(headers)
        self._sender = sender
        self._tensors: dict[tuple[str, str | None], Tensors] = {}

    async def infer(self, model: str, inputs: object, sent: Sent) -> dict[str, Array]:
        """Return the model's outputs. Raises NotTaken, and what the server's answer stands for."""
        tensors = await self.tensors(model, sent)
        try:
            given = as_rows(inputs, tensors.inputs)
            outputs = await self.exchange(model, tensors, given.arrays, sent)
            return {output.name: as_output(output.array, output.dtype) for output in outputs}
        except InvalidRequest:  # perhaps the model is another one by now
            self._tensors.pop((model, sent.version), None)
            raise

    async def allocate(self, model: str, rows: int, sent: Sent) -> HttpRoom:
        """Return memory to write a request's inputs into. Raises InvalidRequest, and as `tensors` does."""
        tensors = await self.tensors(model, sent)
        require_fixed_size(tensors.inputs)
        if rows < 1:
            raise InvalidRequest(f"{rows} rows were asked for; at least 1 is needed")
        inputs = {spec.name: np.zeros((rows, *spec.features), numpy_dtype(spec.dtype)) for spec in tensors.inputs}
        return HttpRoom(self, model, tensors, inputs)

    async def exchange(self, model: str, tensors: Tensors, arrays: tuple[Array, ...], sent: Sent) -> tuple[Output, ...]:
        """Send inputs that fit, and return the outputs."""
        left_s = sent.left_s()
        timeout_us = 0 if left_s is None else max(1, int(left_s * 1e6))
        options = CallOptions(request_id=sent.request_id, timeout_us=timeout_us, priority=sent.priority)
        encoded = encode_call(arrays, tensors.inputs, options)
        headers = {HEADER_LENGTH: str(encoded.header_bytes), "Content-Type": "application/octet-stream"}
        answer = await self._ask(f"{_path(model, sent.version)}/infer", sent, encoded.parts, headers)
        return decode_answer(answer.body, _header_bytes(answer))

    async def tensors(self, model: str, sent: Sent) -> Tensors:
        """Return a model's tensors, asked for once."""
        key = model, sent.version
        if key not in self._tensors:
            self._tensors[key] = decode_metadata((await self._ask(_path(model, sent.version), sent)).body)
        return self._tensors[key]

    async def metadata(self, model: str, sent: Sent) -> dict[str, Any]:
        """Return the protocol's metadata of a model."""
        body = (await self._ask(_path(model, sent.version), sent)).body
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TransportFailed(f"the server's answer is no model metadata: {error}") from error

    async def is_ready(self, sent: Sent) -> bool:
        """Tell whether the server says that it is ready. Raises NotTaken where there is none."""
        return (await self._send("/v2/health/ready", sent)).status == 200

    async def close(self) -> None:
        await self._sender.close()

    async def _ask(
        self,
        path: str,
        sent: Sent,
        parts: tuple[bytes | memoryview, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        """Return an answer of status 200. Raises what any other stands for."""
        answer = await self._send(path, sent, parts, headers)
        if answer.status == 200:
            return answer
        error = of_status(answer.status, answer.headers.get(ERROR_CLASS, ""), error_text(answer.body))
        after_s = retry_after_s(answer.headers.get("Retry-After"))
        if answer.status == 503 and after_s is not None:
            raise NotTaken(error, after_s)
        raise error

    async def _send(
        self,
        path: str,
        sent: Sent,
        parts: tuple[bytes | memoryview, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        call = HttpCall(self._prefix + path, {**self._headers, **(headers or {})}, parts, sent.left_s())
        return await self._sender.send(call)


@dataclass(slots=True)
class HttpRoom:
    """`RingRoom`'s twin where there is no ring: memory of our own, which is sent."""

    _transport: HttpTransport
    _model: str
    _tensors: Tensors
    inputs: dict[str, Array]

    async def answer(self, sent: Sent) -> dict[str, Array]:
        """Send the inputs and return the outputs. Raises as `HttpTransport.infer` does."""
        arrays = tuple(self.inputs[spec.name] for spec in self._tensors.inputs)
        outputs = await self._transport.exchange(self._model, self._tensors, arrays, sent)
        return {output.name: output.array for output in outputs}

    async def close(self) -> None:
        """There is nothing to give back."""


def _path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _header_bytes(answer: HttpAnswer) -> int | None:
    given = answer.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not given.isdecimal() or len(given) > 18:
        raise TransportFailed(f"the server's answer has {HEADER_LENGTH} {given[:40]!r}; it must be a number of bytes")
    return int(given)
