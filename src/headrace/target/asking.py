"""What is asked of a server beside the clock: its model's tensors, its own counts, and answers one by one."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import grpc
import msgspec

from headrace.config import TargetConfig
from headrace.errors import HeadraceError, InvalidOption, RunFailed, TransportFailed, UnknownModel, Unreachable
from headrace.target import null_grpc
from headrace.target.handshake import HANDSHAKE_S, Endpoint, connect, require_handshake, why
from headrace.target.null_server import LOG_PATH, RESET_PATH, Log, read_log
from headrace.wire.datatypes import TO_DTYPE
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.v2 import HEADER_LENGTH
from headrace.wire.v2_call import Output, decode_answer, error_text

SERVICE = "/inference.GRPCInferenceService/"
LARGEST_MESSAGE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor as the server declares it: -1 in a shape stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """What a server has counted of a model since it started."""

    success: int
    fail: int


class Asker(Protocol):
    """Asks one server about one model. Every method raises Unreachable where none is."""

    def inputs(self) -> tuple[Declared, ...]:
        """Return the model's inputs. Raises UnknownModel, TransportFailed."""

    def counts(self) -> ServerCounts | None:
        """Return the server's own counts; None where it has none."""

    def infer(self, body: bytes, header_bytes: int) -> tuple[Output, ...]:
        """Return the answer to a request. Raises RunFailed where it is refused, TransportFailed for what is none."""

    def reset(self) -> None:
        """Have a null server of ours count anew."""

    def log(self) -> Log:
        """Return what a null server of ours saw since `reset`."""

    def close(self) -> None: ...


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _Metadata(msgspec.Struct):
    inputs: list[_Tensor]


class _Duration(msgspec.Struct):
    count: int = 0


class _Stages(msgspec.Struct):
    success: _Duration = msgspec.field(default_factory=_Duration)
    fail: _Duration = msgspec.field(default_factory=_Duration)


class _ModelStats(msgspec.Struct):
    inference_stats: _Stages = msgspec.field(default_factory=_Stages)


class _Statistics(msgspec.Struct):
    model_stats: list[_ModelStats]


def ask(target: TargetConfig, endpoint: Endpoint) -> Asker:
    """Return who asks the server there. Raises Unreachable where TLS fails."""
    return GrpcAsker(target, endpoint) if target.over_grpc else HttpAsker(target, endpoint)


def model_path(target: TargetConfig, url: str) -> str:
    """Return the path of a model, with what the URL puts in front."""
    version = f"/versions/{target.version}" if target.version else ""
    return f"{urlsplit(url).path.rstrip('/')}/v2/models/{quote(target.model, safe='')}{version}"


class HttpAsker:
    def __init__(self, target: TargetConfig, endpoint: Endpoint) -> None:
        self._endpoint, self._url = endpoint, endpoint.url
        self._path = model_path(target, self._url)
        self._prefix = urlsplit(self._url).path.rstrip("/")
        self._timeout_s = target.request_timeout_s
        self._context = endpoint.context() if target.encrypted else None
        self._connection = http.client.HTTPConnection(*endpoint.address, timeout=self._timeout_s)

    def inputs(self) -> tuple[Declared, ...]:
        status, _, body = self._ask("GET", self._path)
        if status != 200:
            raise self._refused(status, body, UnknownModel)
        try:
            return _declared(msgspec.json.decode(body, type=_Metadata).inputs)
        except msgspec.MsgspecError as error:
            raise TransportFailed(f"{self._url}: its answer is no model metadata: {error}") from error

    def counts(self) -> ServerCounts | None:
        try:
            status, _, body = self._ask("GET", f"{self._path}/stats")
            return _summed(msgspec.json.decode(body, type=_Statistics)) if status == 200 else None
        except msgspec.MsgspecError:
            return None

    def infer(self, body: bytes, header_bytes: int) -> tuple[Output, ...]:
        headers = {HEADER_LENGTH: str(header_bytes), "Content-Type": "application/octet-stream"}
        status, told, answer = self._ask("POST", f"{self._path}/infer", body, headers)
        if status != 200:
            raise self._refused(status, answer, RunFailed)
        length = told.get(HEADER_LENGTH.lower())
        return decode_answer(answer, int(length) if length and length.isdecimal() else None)

    def reset(self) -> None:
        self._ask("POST", self._prefix + RESET_PATH)

    def log(self) -> Log:
        return read_log(self._ask("GET", self._prefix + LOG_PATH)[2])

    def close(self) -> None:
        self._connection.close()

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (names in lower case) and body."""
        given = {**self._endpoint.access.authorization, **(headers or {})}
        try:
            if self._context is not None and self._connection.sock is None:
                self._connection.sock = connect(self._endpoint, self._context, min(HANDSHAKE_S, self._timeout_s))
                self._connection.sock.settimeout(self._timeout_s)
            self._connection.request(method, path, body, given)
            answer = self._connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(why(self._endpoint, error)) from error

    def _refused(self, status: int, body: bytes, kind: type[HeadraceError]) -> HeadraceError:
        """Return what an answer other than 200 means."""
        text = self._endpoint.access.hide(error_text(body))
        if status == 401:
            return not_let_in(self._endpoint, f"status 401: {text}")
        return kind(f"{self._url}{self._path}: status {status}: {text}")


class GrpcAsker:
    def __init__(self, target: TargetConfig, endpoint: Endpoint) -> None:
        self._endpoint, self._url, self._target = endpoint, endpoint.url, target
        if target.encrypted:
            require_handshake(endpoint, min(HANDSHAKE_S, target.request_timeout_s))
        self._channel = endpoint.access.channel(endpoint.target, LARGEST_MESSAGE)

    def inputs(self) -> tuple[Declared, ...]:
        request = pb.ModelMetadataRequest(name=self._target.model, version=self._target.version or "")
        metadata = pb.ModelMetadataResponse.FromString(self._call("ModelMetadata", request.SerializeToString()))
        return _declared(metadata.inputs)

    def counts(self) -> ServerCounts | None:
        request = pb.ModelStatisticsRequest(name=self._target.model, version=self._target.version or "")
        try:
            answer = self._call("ModelStatistics", request.SerializeToString())
        except (RunFailed, UnknownModel):
            return None
        stats = [each.inference_stats for each in pb.ModelStatisticsResponse.FromString(answer).model_stats]
        return ServerCounts(sum(each.success.count for each in stats), sum(each.fail.count for each in stats))

    def infer(self, body: bytes, header_bytes: int) -> tuple[Output, ...]:  # noqa: ARG002  all of it is the message
        return decode_message(self._call("ModelInfer", body))

    def reset(self) -> None:
        self._call(null_grpc.RESET, b"")

    def log(self) -> Log:
        return read_log(self._call(null_grpc.LOG, b""))

    def close(self) -> None:
        self._channel.close()

    def _call(self, name: str, message: bytes) -> bytes:
        path = name if name.startswith("/") else SERVICE + name
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(path)
        try:
            answer: bytes = call(
                message, timeout=self._target.request_timeout_s, metadata=self._endpoint.access.metadata
            )
        except grpc.RpcError as error:
            code, details = status_of(error)
            details = self._endpoint.access.hide(details)
            if code == grpc.StatusCode.UNAVAILABLE:
                raise Unreachable(why(self._endpoint, ConnectionError(details))) from error
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise not_let_in(self._endpoint, details) from error
            kind = UnknownModel if code == grpc.StatusCode.NOT_FOUND else RunFailed
            raise kind(f"{self._url}: {name}: {code.name}: {details}") from error
        return answer


def not_let_in(endpoint: Endpoint, said: str) -> InvalidOption:
    """Return the error of a server that wants a token, or another one."""
    remedy = (
        "name a file that holds its bearer token with --token-file, or a variable with --token-env"
        if endpoint.access.token is None
        else "it does not take the token that --token-file or --token-env gave; give one that it knows"
    )
    return InvalidOption(f"{endpoint.url}: the server lets nobody in without a token ({said}); {remedy}")


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return the code and the words of a call's error: grpcio's are calls too, which their type does not say."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:
        return grpc.StatusCode.UNKNOWN, str(error)
    return code(), details() or ""


def decode_message(message: bytes) -> tuple[Output, ...]:
    """Read a ModelInferResponse whose outputs are raw. Raises TransportFailed for what is none."""
    try:
        response = pb.ModelInferResponse.FromString(message)
    except Exception as error:
        raise TransportFailed(f"the answer is no ModelInferResponse: {error}") from error
    if len(response.raw_output_contents) != len(response.outputs):
        raise TransportFailed("the answer has outputs that are not raw; typed lists are not read here")
    head = {
        "outputs": [
            {
                "name": each.name,
                "datatype": each.datatype,
                "shape": list(each.shape),
                "parameters": {"binary_data_size": len(raw)},
            }
            for each, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]
    }
    json = msgspec.json.encode(head)
    return decode_answer(json + b"".join(response.raw_output_contents), len(json))


def _declared(tensors: Any) -> tuple[Declared, ...]:  # noqa: ANN401  of JSON or of protobuf
    declared = tuple(Declared(each.name, each.datatype, tuple(each.shape)) for each in tensors)
    unknown = [each for each in declared if each.datatype not in TO_DTYPE and each.datatype != "BYTES"]
    if unknown:
        raise TransportFailed(f"input {unknown[0].name} has datatype {unknown[0].datatype}, which is not known here")
    return declared


def _summed(told: _Statistics) -> ServerCounts:
    stats = [each.inference_stats for each in told.model_stats]
    return ServerCounts(sum(each.success.count for each in stats), sum(each.fail.count for each in stats))
