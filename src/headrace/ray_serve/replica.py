"""What Serve runs: one engine, called by handles with tensors, by HTTP through an ASGI application, and by gRPC."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message

from headrace.errors import HeadraceError, InvalidRequest, Unavailable, UnknownModel
from headrace.frontend import service as meaning
from headrace.processes import keep_freed_memory
from headrace.ray_serve import answering
from headrace.ray_serve.http import HttpV2
from headrace.ray_serve.model import ReplicaModel, described, start_engine, told
from headrace.wire.grpc import codec
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.places import RegionPlace

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext

    from headrace.model.signature import Inputs

MAX_BODY_BYTES = 256 << 20
DETAILS = 600  # characters of an error's text: it travels in a header, of which gRPC takes 8 KiB
_log = logging.getLogger(__name__)

Asked = TypeVar("Asked", bound=Message)


@dataclass(frozen=True, slots=True)
class Raw:
    """A response that is bytes already; Serve asks every response for these."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802  protobuf's name
        return self.data


class Replica:
    """One engine. Its methods of the protocol's names are what gRPC proxies call, with a message's bytes.

    `source` and `options` are the words of `headrace serve` and of a file's `[[models]]`, with underscores: `name`,
    `device`, `precision`, `max_batch_size`, `num_workers` and so on.
    """

    def __init__(self, source: str, **options: Any) -> None:  # noqa: ANN401  ModelOptions checks them
        keep_freed_memory()
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # inputs are only read
        served = described(source, options)
        self._model = ReplicaModel(served, start_engine(served, _log.warning))
        _log.info("%s is ready: %s", served.name, self._model.engine.report.form)

    async def infer(self, inputs: Inputs, timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """Return the model's outputs for these rows, as `Engine.infer` does. Raises as it does."""
        return await asyncio.wrap_future(self._model.submit(inputs, timeout_s))

    def check_health(self) -> None:
        """Raise EngineStopped if no request can be computed; Serve then starts another replica in place of this."""
        self._model.engine.check()

    def __del__(self) -> None:
        """Answer what was taken. Serve calls it when the replica has no more requests, or their time is up."""
        model = getattr(self, "_model", None)
        if model is not None:
            model.stop()

    async def ServerLive(self, _: bytes) -> pb.ServerLiveResponse:  # noqa: N802  the protocol's names
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: bytes) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(self, message: bytes) -> pb.ModelReadyResponse:  # noqa: N802
        try:
            asked = _parsed(message, pb.ModelReadyRequest)
            self._model.find(asked.name, asked.version or None)
        except (InvalidRequest, UnknownModel):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._is_ready())

    async def ServerMetadata(self, _: bytes) -> pb.ServerMetadataResponse:  # noqa: N802
        return _filled(answering.server_metadata(), pb.ServerMetadataResponse())

    async def ModelMetadata(self, message: bytes, grpc_context: RayServegRPCContext) -> Raw:  # noqa: N802
        async def answer() -> bytes:
            asked = _parsed(message, pb.ModelMetadataRequest)
            model = self._model.find(asked.name, asked.version or None)
            return _filled(meaning.model_metadata(model), pb.ModelMetadataResponse()).SerializeToString()

        return await _answered(answer, grpc_context)

    async def ModelConfig(self, message: bytes, grpc_context: RayServegRPCContext) -> Raw:  # noqa: N802
        async def answer() -> bytes:
            asked = _parsed(message, pb.ModelConfigRequest)
            model = self._model.find(asked.name, asked.version or None)
            return _filled({"config": meaning.model_config(model)}, pb.ModelConfigResponse()).SerializeToString()

        return await _answered(answer, grpc_context)

    async def ModelInfer(self, message: bytes, grpc_context: RayServegRPCContext) -> Raw:  # noqa: N802
        async def answer() -> bytes:
            parsed = codec.parse(message)
            model = self._model.find(parsed.message.model_name, parsed.message.model_version or None)
            request = codec.decode(parsed, model.inputs, model.outputs)
            regions = any(wanted.place for wanted in request.outputs)
            inputs = [data for data in request.inputs if not isinstance(data, RegionPlace)]
            answering.require_offered(regions=regions or len(inputs) < len(request.inputs), priority=request.priority)
            outputs = await answering.infer(self._model, inputs, request.rows, request.timeout_us)
            return codec.encode(request, model.name, model.version, outputs, model.outputs).message()

        return await _answered(answer, grpc_context)

    def _is_ready(self) -> bool:
        try:
            self._model.engine.check()
        except Unavailable:
            return False
        return True


class HttpReplica(Replica):
    """A replica that answers HTTP too."""

    def __init__(self, source: str, *, max_body_bytes: int = MAX_BODY_BYTES, **options: Any) -> None:  # noqa: ANN401
        super().__init__(source, **options)
        self._max_body_bytes = max_body_bytes

    def __serve_build_asgi_app__(self) -> HttpV2:
        """Return the application. Serve asks for it when the replica is ready; see `serve.ingress`."""
        return HttpV2(self._model, self._max_body_bytes)


def _parsed(message: bytes, kind: type[Asked]) -> Asked:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no {kind.DESCRIPTOR.name} of the protocol") from error


def _filled(content: Mapping[str, object], message: Asked) -> Asked:
    ParseDict(dict(content), message, ignore_unknown_fields=True)
    return message


async def _answered(answer: Callable[[], Awaitable[bytes]], context: RayServegRPCContext) -> Raw:
    """Return an answer, or tell the proxy what the call fails with: it takes the code from the context."""
    try:
        return Raw(await answer())
    except Exception as error:  # noqa: BLE001  the client is told
        known = told(error)
        if not isinstance(error, HeadraceError):
            _log.exception("a gRPC call failed")
        context.set_code(grpc.StatusCode[known.grpc_code])
        context.set_details(str(known)[:DETAILS])
        raise known from None
