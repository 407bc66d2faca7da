"""The service over gRPC, as the KServe v2 protocol and Triton's extensions have it: calls to calls, errors to codes.

Infer calls are taken and answered as bytes (`wire.grpc.frame`); all others are small, and the protobuf library's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from headrace.control import RegionSpec
from headrace.errors import HeadraceError, NotOffered, NotReady, UnknownModel
from headrace.frontend import service as meaning
from headrace.frontend.regions import NO_CUDA_MEMORY
from headrace.frontend.service import InferOptions
from headrace.frontend.tracing import rpc_outcome
from headrace.wire.elements import least_bytes, place, raw
from headrace.wire.grpc import codec
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.places import RegionPlace

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.link import Call
    from headrace.frontend.regions import SharedRegions
    from headrace.frontend.service import Service
    from headrace.frontend.spans import Tracer
    from headrace.frontend.tracing import Trace

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

    class InferCall(Protocol):
        """An infer call; `trace`, where it is sampled, is told of its error and its stages."""

        async def __call__(self, message: bytes, context: Context, trace: Trace | None = None, /) -> bytes: ...


SERVICE = "inference.GRPCInferenceService"
RETRY_AFTER_S = 1
STREAM_REQUESTS = 64  # of one stream at once; beyond them it is read on when the first of them has been answered

DETAILS = 600  # characters of an error's text: it travels in a header, of which gRPC takes 8 KiB

_log = logging.getLogger(__name__)

Asked = TypeVar("Asked", bound=Message)
Told = TypeVar("Told", bound=Message)


class Calls:
    """What each of the protocol's calls does."""

    def __init__(self, service: Service, regions: SharedRegions, tracer: Tracer | None = None) -> None:
        self._service = service
        self._regions = regions
        self._infer_unary = _traced(tracer, "ModelInfer", self._model_infer)
        self._infer_of_stream = _traced(tracer, "ModelStreamInfer", self._stream_infer)
        self._readers: set[asyncio.Task[None]] = set()  # of streams
        self._stopping = False

    def stop(self) -> None:
        """Read no more from streams: each ends when what it brought has been answered."""
        self._stopping = True
        for reader in self._readers:
            reader.cancel()

    def handlers(self) -> dict[str, Handler]:
        """Return all calls by name."""
        return {
            "ServerLive": _unary(pb.ServerLiveRequest, self._server_live),
            "ServerReady": _unary(pb.ServerReadyRequest, self._server_ready),
            "ModelReady": _unary(pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": _unary(pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": _unary(pb.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer_unary),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._model_stream_infer),
            "ModelConfig": _unary(pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": _unary(pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": _unary(pb.RepositoryIndexRequest, self._repository_index),
            "RepositoryModelLoad": _unary(pb.RepositoryModelLoadRequest, self._repository_model_load),
            "RepositoryModelUnload": _unary(pb.RepositoryModelUnloadRequest, self._repository_model_unload),
            "SystemSharedMemoryStatus": _unary(pb.SystemSharedMemoryStatusRequest, self._region_status),
            "SystemSharedMemoryRegister": _unary(pb.SystemSharedMemoryRegisterRequest, self._region_register),
            "SystemSharedMemoryUnregister": _unary(pb.SystemSharedMemoryUnregisterRequest, self._region_unregister),
            "CudaSharedMemoryStatus": _unary(pb.CudaSharedMemoryStatusRequest, self._cuda_status),
            "CudaSharedMemoryRegister": _unary(pb.CudaSharedMemoryRegisterRequest, self._cuda_register),
            "CudaSharedMemoryUnregister": _unary(pb.CudaSharedMemoryUnregisterRequest, self._cuda_unregister),
        }

    async def _server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._service.is_ready())

    async def _model_ready(self, asked: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            self._model(asked.name, asked.version)
        except (UnknownModel, NotReady):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        metadata = meaning.server_metadata(shared_memory=self._regions.own.offered)
        return _filled(metadata, pb.ServerMetadataResponse())

    async def _model_metadata(self, asked: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        model = self._model(asked.name, asked.version)
        return _filled(meaning.model_metadata(model, self._service.versions(model.name)), pb.ModelMetadataResponse())

    async def _model_config(self, asked: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        model = self._model(asked.name, asked.version)
        return _filled({"config": meaning.model_config(model)}, pb.ModelConfigResponse())

    async def _model_statistics(self, asked: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        names = [asked.name] if asked.name else [name for name in self._service.names if self._service.pools.get(name)]
        models = [self._model(name, asked.version) for name in names]
        told = pb.ModelStatisticsResponse()
        for model in models:
            told.MergeFrom(_filled(meaning.model_statistics(model, self._service.totals), pb.ModelStatisticsResponse()))
        return told

    async def _repository_index(self, asked: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        index = meaning.repository_index(self._service, only_ready=asked.ready)
        return _filled({"models": index}, pb.RepositoryIndexResponse())

    async def _repository_model_load(self, asked: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        await self._service.load(asked.model_name, dict(asked.parameters))
        return pb.RepositoryModelLoadResponse()

    async def _repository_model_unload(
        self, asked: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        await self._service.unload(asked.model_name, dict(asked.parameters))
        return pb.RepositoryModelUnloadResponse()

    async def _region_status(self, asked: pb.SystemSharedMemoryStatusRequest) -> pb.SystemSharedMemoryStatusResponse:
        told = pb.SystemSharedMemoryStatusResponse()
        for spec in self._regions.own.status(asked.name or None):
            region = told.regions[spec.name]
            region.name, region.key, region.offset, region.byte_size = spec.name, spec.key, spec.offset, spec.byte_size
        return told

    async def _region_register(
        self, asked: pb.SystemSharedMemoryRegisterRequest
    ) -> pb.SystemSharedMemoryRegisterResponse:
        spec = RegionSpec(name=asked.name, key=asked.key, offset=asked.offset, byte_size=asked.byte_size)
        await self._regions.register(spec)
        return pb.SystemSharedMemoryRegisterResponse()

    async def _region_unregister(
        self, asked: pb.SystemSharedMemoryUnregisterRequest
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        await self._regions.unregister(asked.name or None)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def _cuda_status(self, _: pb.CudaSharedMemoryStatusRequest) -> pb.CudaSharedMemoryStatusResponse:
        return pb.CudaSharedMemoryStatusResponse()

    async def _cuda_register(self, _: pb.CudaSharedMemoryRegisterRequest) -> pb.CudaSharedMemoryRegisterResponse:
        raise NotOffered(NO_CUDA_MEMORY)

    async def _cuda_unregister(self, _: pb.CudaSharedMemoryUnregisterRequest) -> pb.CudaSharedMemoryUnregisterResponse:
        return pb.CudaSharedMemoryUnregisterResponse()  # perf_analyzer begins with it, whatever there is

    async def _model_infer(self, message: bytes, context: Context, trace: Trace | None = None) -> bytes:
        try:
            return await self._infer(codec.parse(message), context, codec.Response.message, trace)
        except Exception as error:  # noqa: BLE001
            _note(trace, error)
            await _abort(context, error)

    async def _model_stream_infer(self, _: object, context: Context) -> None:
        """Answer a stream's requests in their order, while they are computed side by side.

        A request that fails is answered with its error, and the stream goes on. When the server stops, what was read is
        answered first.
        """
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(STREAM_REQUESTS)
        async with asyncio.TaskGroup() as tasks:  # a client that leaves ends them all

            async def read() -> None:
                try:
                    while await room.acquire() and (message := await context.read()) is not grpc.aio.EOF:
                        answers.put_nowait(tasks.create_task(self._infer_of_stream(message, context)))
                finally:
                    answers.put_nowait(None)

            with self._stopped_with_us(tasks.create_task(read())):
                while (answer := await answers.get()) is not None:
                    await context.write(await answer)
                    room.release()
        if self._stopping:
            await _abort(context, NotReady("the server is stopping; open a stream to another one"))

    @contextmanager
    def _stopped_with_us(self, reader: asyncio.Task[None]) -> Iterator[None]:
        self._readers.add(reader)
        try:
            yield
        finally:
            self._readers.discard(reader)

    async def _stream_infer(self, message: bytes, context: Context, trace: Trace | None = None) -> bytes:
        request_id = ""
        try:
            parsed = codec.parse(message)
            request_id = parsed.message.id
            return await self._infer(parsed, context, codec.Response.stream_message, trace)
        except Exception as error:  # noqa: BLE001
            _note(trace, error)
            return codec.stream_error(str(_told(error)), request_id)

    async def _infer(
        self,
        parsed: codec.Parsed,
        context: Context,
        finish: Callable[[codec.Response], bytes],
        trace: Trace | None,
    ) -> bytes:
        model = self._model(parsed.message.model_name, parsed.message.model_version)
        request = codec.decode(parsed, model.inputs, model.outputs)
        windows = {
            wanted.number: self._regions.own.output(
                wanted.place, least_bytes(model.outputs[wanted.number], request.rows)
            )
            for wanted in request.outputs
            if wanted.place is not None
        }
        options = InferOptions(timeout_us=_timeout_us(request, context), priority=request.priority, trace=trace)
        with self._service.call(model.name, model.version, request.rows, options) as call:
            self._fill(call, request, model)
            await call.answer()
            outputs = [raw(call.output(number), spec) for number, spec in enumerate(model.outputs)]
            for number, window in windows.items():
                window.write(outputs[number])
            return finish(codec.encode(request, model.name, model.version, outputs, model.outputs))

    def _fill(self, call: Call, request: codec.InferRequest, model: ServedModel) -> None:
        for number, (data, spec) in enumerate(zip(request.inputs, model.inputs, strict=True)):
            if isinstance(data, RegionPlace):
                self._regions.own.read_tensor(data, call.input(number), spec)
            else:
                place(call.input(number), data, spec)

    def _model(self, name: str, version: str) -> ServedModel:
        return self._service.model(name, version or None)


def _unary(kind: type[Asked], call: Callable[[Asked], Awaitable[Message]]) -> Handler:
    async def answered(asked: Asked, context: Context) -> Message:
        try:
            return await call(asked)
        except Exception as error:  # noqa: BLE001
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(answered, kind.FromString, methodcaller("SerializeToString"))


def _traced(tracer: Tracer | None, method: str, infer: InferCall) -> InferCall:
    """Return the same call, made a span where it is sampled."""
    if tracer is None:
        return infer
    outcome = partial(rpc_outcome, f"{SERVICE}/{method}")

    async def traced(message: bytes, context: Context, _: Trace | None = None) -> bytes:
        sampled = tracer.sampled(cast("dict[str, str]", dict(context.invocation_metadata() or ())))
        if sampled is None:
            return await infer(message, context)
        with tracer.request(sampled, outcome) as trace:
            return await infer(message, context, trace)

    return traced


def _note(trace: Trace | None, error: Exception) -> None:
    if trace is not None:
        trace.error = error


def _filled(content: dict[str, object], told: Told) -> Told:
    """Return a message with the content of the JSON that HTTP sends; what the message has no field for is left out."""
    ParseDict(content, told, ignore_unknown_fields=True)
    return told


def _timeout_us(request: codec.InferRequest, context: Context) -> int:
    """Return the shorter of what the request allows and what is left of the call's deadline; 0: no limit."""
    left_s = cast("float | None", context.time_remaining())
    if left_s is None:
        return request.timeout_us
    left_us = max(1, int(left_s * 1e6))
    return min(request.timeout_us or left_us, left_us)


def _told(error: Exception) -> HeadraceError:
    """Return what a client is told of an error; what is our own bug goes into the log."""
    if isinstance(error, HeadraceError):
        return error
    _log.error("a gRPC call failed", exc_info=error)
    return HeadraceError("the server failed on this call, and says why in its log")


async def _abort(context: Context, error: Exception) -> NoReturn:
    told = _told(error)
    code = grpc.StatusCode[told.grpc_code]
    retry = (("retry-after", str(RETRY_AFTER_S)),) if code is grpc.StatusCode.UNAVAILABLE else ()
    await context.abort(code, str(told)[:DETAILS], retry)
