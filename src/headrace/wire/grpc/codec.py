"""KServe v2 over gRPC: infer requests to tensors' bytes and back, raw or in typed lists.

Tensors' bytes are little-endian and row-major, whatever form they came in; nothing here knows torch. Source: Open
Inference Protocol (gRPC) and Triton's shared memory extension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire.datatypes import FROM_DTYPE, numpy_dtype
from headrace.wire.elements import pack
from headrace.wire.grpc import frame
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.match import OutputPlace, common_rows, matched, output_places, packed_bytes
from headrace.wire.places import BYTE_SIZE, OFFSET, REGION, RegionPlace, region_place

if TYPE_CHECKING:
    InputTensor = pb.ModelInferRequest.InferInputTensor

LONGEST_TIMEOUT_US = 10**12  # eleven days; longer ones are as good as this

_ELEMENTS = {  # of a list: what it holds
    "bool_contents": np.bool_,
    "int_contents": np.int32,
    "int64_contents": np.int64,
    "uint_contents": np.uint32,
    "uint64_contents": np.uint64,
    "fp32_contents": np.float32,
    "fp64_contents": np.float64,
}
_CONTENTS = {  # of a datatype: the list that holds its elements; FP16 and BF16 have none
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request that is a message, before it is known whether a model can take it."""

    message: pb.ModelInferRequest  # without raw inputs
    raw: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A decoded request: each of the model's inputs in the model's order, as raw bytes or where they lie."""

    id: str
    rows: int
    inputs: tuple[memoryview | RegionPlace, ...]
    outputs: tuple[OutputPlace, ...]
    timeout_us: int  # 0: none was given
    priority: int


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose raw outputs are not copied yet."""

    head: bytes
    raw: tuple[bytes | memoryview, ...]

    def message(self) -> bytes:
        """Return a ModelInferResponse's bytes."""
        return frame.join(self.head, self.raw)

    def stream_message(self) -> bytes:
        """Return a ModelStreamInferResponse's bytes."""
        return frame.join(self.head, self.raw, stream=True)


def parse(message: bytes) -> Parsed:
    """Read a ModelInferRequest's bytes. Raises InvalidRequest."""
    parts = frame.split(message)
    try:
        return Parsed(pb.ModelInferRequest.FromString(parts.head), parts.raw)
    except DecodeError as error:
        raise InvalidRequest("the request is no ModelInferRequest of the protocol") from error


def decode(parsed: Parsed, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """Read a request for a model of these tensors. Raises InvalidRequest, naming the field, the value and the limit."""
    message = parsed.message
    parameters = _values(message.parameters)
    sequence = [name for name in parameters if name.startswith("sequence_")]
    if sequence:
        raise InvalidRequest(f"parameter {sequence[0]}: the model keeps no state between requests; leave it out")
    rows = common_rows(matched(message.inputs, inputs).values())
    specs = {spec.name: spec for spec in inputs}
    data = dict(zip((tensor.name for tensor in message.inputs), _tensors(parsed, specs), strict=True))
    return InferRequest(
        id=message.id,
        rows=rows,
        inputs=tuple(data[spec.name] for spec in inputs),
        outputs=tuple(_wanted(message, outputs)),
        timeout_us=min(_whole(parameters, "timeout"), LONGEST_TIMEOUT_US),
        priority=_whole(parameters, "priority"),
    )


def encode(
    request: InferRequest, model: str, version: str, outputs: Sequence[memoryview], specs: Sequence[TensorSpec]
) -> Response:
    """Write the response: `outputs` are raw bytes of all of the model's outputs, of `request.rows` rows each.

    Those of BYTES are packed. They are copied when the response's bytes are asked for.
    """
    response = pb.ModelInferResponse(model_name=model, model_version=version, id=request.id)
    raw: list[bytes | memoryview] = []
    for wanted in request.outputs:
        spec = specs[wanted.number]
        shape = (request.rows, *spec.features)
        tensor = response.outputs.add(name=spec.name, datatype=FROM_DTYPE[spec.dtype], shape=shape)
        if wanted.place is None:
            raw.append(outputs[wanted.number])
            continue
        tensor.parameters[REGION].string_param = wanted.place.region
        tensor.parameters[OFFSET].int64_param = wanted.place.offset
        tensor.parameters[BYTE_SIZE].int64_param = len(outputs[wanted.number])
        raw.append(b"")  # clients count these by output; perf_analyzer ends with a segmentation fault without
    return Response(response.SerializeToString(), tuple(raw))


def stream_error(text: str, request_id: str) -> bytes:
    """Return the ModelStreamInferResponse of a request that failed."""
    response = pb.ModelInferResponse(id=request_id)
    return pb.ModelStreamInferResponse(error_message=text, infer_response=response).SerializeToString()


def _value(parameter: pb.InferParameter) -> object:
    """Return a parameter's value; None if it has none, or one of a kind that is not known here."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, object]:
    return {key: _value(parameter) for key, parameter in parameters.items()}


def _whole(parameters: Mapping[str, object], name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or value < 0:
        raise InvalidRequest(f"parameter {name} is {value!r}; it must be a whole number, at least 0")
    return value


def _tensors(parsed: Parsed, specs: Mapping[str, TensorSpec]) -> Iterator[memoryview | RegionPlace]:
    """Yield each input's data, in the message's order, which is that of the raw contents too."""
    raw = iter(parsed.raw)
    taken = 0
    for tensor in parsed.message.inputs:
        spec = specs[tensor.name]
        place = region_place(f"input {tensor.name}", _values(tensor.parameters))
        if tensor.HasField("contents") and (parsed.raw or place):
            raise InvalidRequest(
                f"input {tensor.name} has contents, and the request raw_input_contents or the input a region; send its"
                " data once, and all of a request's tensors raw or none"
            )
        if place is not None:
            packed_bytes(tensor, spec, place.byte_size, REGION)
            yield place
        elif parsed.raw:
            data = next(raw, None)
            if data is None:
                raise InvalidRequest(
                    f"input {tensor.name} has no data: there are {len(parsed.raw)} raw_input_contents; each input that"
                    " is not in shared memory needs one"
                )
            taken += 1
            packed_bytes(tensor, spec, len(data), "raw_input_contents")
            yield data
        else:
            yield _from_contents(tensor, spec)
    if taken != len(parsed.raw):
        raise InvalidRequest(f"there are {len(parsed.raw)} raw_input_contents for {taken} inputs; send one for each")


def _from_contents(tensor: InputTensor, spec: TensorSpec) -> memoryview:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidRequest(f"input {tensor.name} is {tensor.datatype}, which contents cannot carry; send it raw")
    others = [descriptor.name for descriptor, _ in tensor.contents.ListFields() if descriptor.name != field]
    if others:
        raise InvalidRequest(f"input {tensor.name} is {tensor.datatype} and has {others[0]}; send {field}")
    given = getattr(tensor.contents, field)
    needed = math.prod(tensor.shape)
    if len(given) != needed:
        raise InvalidRequest(
            f"input {tensor.name} has {len(given)} values in {field}; its shape {list(tensor.shape)} needs {needed}"
        )
    if spec.is_bytes:
        return memoryview(pack(given))
    dtype = numpy_dtype(spec.dtype)
    listed: np.ndarray[Any, np.dtype[Any]] = np.asarray(given[:], _ELEMENTS[field])
    values = listed.astype(dtype)
    if dtype.kind in "iu" and (values != listed).any():
        raise InvalidRequest(f"input {tensor.name}: its data holds values that are no {tensor.datatype}")
    return memoryview(values.tobytes())


def _wanted(message: pb.ModelInferRequest, outputs: Sequence[TensorSpec]) -> list[OutputPlace]:
    if not message.outputs:
        return [OutputPlace(number, None) for number in range(len(outputs))]
    return output_places(((output.name, _values(output.parameters)) for output in message.outputs), outputs)
