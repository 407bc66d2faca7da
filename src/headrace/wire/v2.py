"""KServe v2 over HTTP: requests to tensors' bytes and back, as JSON and with the binary extension.

Tensors travel as raw little-endian bytes, row-major, whatever form they came in; nothing here knows torch. Source: Open
Inference Protocol (required API) and Triton's binary tensor data and shared memory extensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire import elements
from headrace.wire.datatypes import BINARY_ONLY, FROM_DTYPE, numpy_dtype
from headrace.wire.match import common_rows, matched, output_places, packed_bytes
from headrace.wire.places import REGION, RegionPlace, region_place

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY_SIZE = "binary_data_size"
MAX_TIMEOUT_US = 2**53 // 1000  # nanoseconds that every JSON number holds: 104 days
MAX_PRIORITY = 2**31 - 1
SHOWN = 80  # characters of a client's value in a message
_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
ERROR_CLASS = "Headrace-Error"  # of `headrace.errors`: our own client raises it again


@dataclass(frozen=True, slots=True)
class WantedOutput:
    name: str
    binary: bool
    place: RegionPlace | None = None  # where it is to be written; None: into the response
    base64: bool = False  # strings of BYTES in JSON are to be that


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded request. Inputs are numbered in the model's order; each is in one of `inline`, `binary`, `regions`."""

    id: str | None
    rows: int
    inline: Mapping[int, memoryview]  # raw bytes of inputs that came as JSON
    binary: Mapping[int, int]  # bytes of inputs whose raw ones follow the JSON, one after the other in this order
    outputs: tuple[WantedOutput, ...]
    regions: Mapping[int, RegionPlace] = field(default_factory=dict)  # inputs in the client's shared memory
    timeout_us: int = 0  # 0: no limit
    priority: int = 0  # 0: not given
    is_one_element: bool = False  # the only input is BYTES, and its one element came without its length

    def gather(self, tail: memoryview) -> dict[int, memoryview]:
        """Return the raw bytes of all inputs that came with the request; `tail` is what followed the JSON.

        Those of BYTES are packed; see `wire.elements`.
        """
        data = dict(self.inline)
        at = 0
        for number, size in self.binary.items():
            data[number] = tail[at : at + size]
            at += size
        return {0: memoryview(elements.pack([tail]))} if self.is_one_element else data


@dataclass(frozen=True, slots=True)
class Encoded:
    """A response: JSON, and the tensors' bytes that follow it, where they lie."""

    json: bytes
    tensors: tuple[memoryview, ...]


def _numbers(levels: int) -> Any:  # noqa: ANN401  a type that is made here
    """Return the type of numbers in lists within lists. Strings among them would each take the longest one's memory."""
    number: Any = bool | int | float
    found: Any = number
    for _ in range(levels):
        found = number | list[found]
    return found


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()  # decoded by the model's datatype


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] | None = None


_decode = msgspec.json.Decoder(_Request).decode
_decode_numbers = msgspec.json.Decoder(_numbers(levels=32)).decode  # dimensions of an array, of numpy 1


def decode(
    json: bytes | memoryview, tail_bytes: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """Read the JSON of an infer request for a model of these tensors; `tail_bytes` raw ones follow it in the body.

    Raises InvalidRequest, naming the field, the value and the limit.
    """
    request = _parsed(json)
    given = matched(request.inputs, inputs)
    sources = {name: _source(tensor) for name, tensor in given.items()}
    binary = [tensor for tensor in request.inputs if sources[tensor.name] == BINARY_SIZE]
    sizes = _binary_sizes(binary, tail_bytes, {spec.name: spec for spec in inputs})
    rows = common_rows(given.values())
    numbers = {spec.name: number for number, spec in enumerate(inputs)}
    return InferRequest(
        id=request.id or None,  # perf_analyzer sends "id": ""
        rows=rows,
        inline={
            number: _from_json(given[spec.name], spec)
            for number, spec in enumerate(inputs)
            if sources[spec.name] == "data"
        },
        binary={numbers[name]: size for name, size in sizes.items()},
        regions={
            number: _place(given[spec.name], spec) for number, spec in enumerate(inputs) if sources[spec.name] == REGION
        },
        outputs=_wanted(request, outputs),
        timeout_us=_whole_number(request, "timeout", MAX_TIMEOUT_US),
        priority=_whole_number(request, "priority", MAX_PRIORITY),
    )


def decode_raw(body_bytes: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """Read the request that a body is which holds the only input's bytes and nothing else. Raises InvalidRequest.

    Of datatype BYTES it is one element, without its length, as a file is.
    """
    if len(inputs) != 1:
        raise InvalidRequest(
            f"a raw body ({HEADER_LENGTH}: 0) can fill one input; the model has {len(inputs)}, so send JSON before it"
        )
    wanted = tuple(WantedOutput(spec.name, binary=True) for spec in outputs)
    if inputs[0].is_bytes:
        elements.require_fits(body_bytes, inputs[0], 0)
        return InferRequest(None, 1, {}, {0: body_bytes}, wanted, is_one_element=True)
    size = inputs[0].row_bytes
    rows, rest = divmod(body_bytes, size)
    if rest or not rows:
        raise InvalidRequest(
            f"a raw body of {body_bytes} bytes; a row of {inputs[0].name} has {size}, so send a multiple"
        )
    return InferRequest(None, rows, {}, {0: body_bytes}, wanted)


def json_bytes(header_bytes: int | None, body_bytes: int) -> int:
    """Return how much of a body is JSON; `header_bytes` is the binary extension's header. Raises InvalidRequest."""
    if header_bytes is None:
        return body_bytes
    if header_bytes > body_bytes:
        raise InvalidRequest(f"{HEADER_LENGTH} is {header_bytes}; it must be 0 to the body's {body_bytes} bytes")
    return header_bytes


def encode(
    request: InferRequest, model: str, version: str, outputs: Mapping[str, memoryview], specs: Sequence[TensorSpec]
) -> Encoded:
    """Write the response: `outputs` are raw bytes by name, of `request.rows` rows each, those of BYTES packed.

    Outputs in regions are named with their shape and no parameters: perf_analyzer ends where there are any without
    binary_data_size.
    """
    by_name = {spec.name: spec for spec in specs}
    told = []
    tail = []
    for wanted in request.outputs:
        spec, data = by_name[wanted.name], outputs[wanted.name]
        tensor: dict[str, object] = {
            "name": spec.name,
            "datatype": FROM_DTYPE[spec.dtype],
            "shape": [request.rows, *spec.features],
        }
        if wanted.place is None and (wanted.binary or FROM_DTYPE[spec.dtype] in BINARY_ONLY):
            tensor["parameters"] = {BINARY_SIZE: len(data)}
            tail.append(data)
        elif wanted.place is None and spec.is_bytes:
            tensor["data"], is_base64 = elements.to_json(data, spec.name, as_base64=wanted.base64)
            if is_base64:
                tensor["parameters"] = {elements.CONTENT_TYPE: elements.BASE64}
        elif wanted.place is None:
            tensor["data"] = np.frombuffer(data, numpy_dtype(spec.dtype)).tolist()
        told.append(tensor)
    head: dict[str, object] = {"model_name": model, "model_version": version, "outputs": told}
    if request.id is not None:
        head["id"] = request.id
    return Encoded(msgspec.json.encode(head), tuple(tail))


def _parsed(json: bytes | memoryview) -> _Request:
    try:
        request = _decode(json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request is no v2 infer request: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the request's JSON is nested too deeply; send data flat, or as binary tensors") from error
    sequences = [name for name in _SEQUENCES if request.parameters.get(name)]
    if sequences:
        raise InvalidRequest(
            f"the request has {', '.join(sequences)}; stateful models, which need that, are not served: leave it out"
        )
    return request


def _whole_number(request: _Request, name: str, limit: int) -> int:
    """Return a parameter of the request; 0 where it was not given."""
    value = request.parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= limit:
        raise InvalidRequest(f"the request's {name} is {_shown(value)}; it must be a whole number from 0 to {limit}")
    return value


def _shown(value: object) -> str:
    """Return a client's value for a message, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _source(tensor: _Input) -> str:
    """Return what says where an input's data is. Raises InvalidRequest unless exactly one thing does."""
    sources = [name for name in (BINARY_SIZE, REGION) if name in tensor.parameters]
    if bytes(memoryview(tensor.data)[:5]) not in (b"", b"null"):
        sources.append("data")
    if len(sources) != 1:
        raise InvalidRequest(
            f"input {tensor.name} has {' and '.join(sources) or 'no data'}; send one of data, {BINARY_SIZE} and"
            f" {REGION}"
        )
    return sources[0]


def _binary_sizes(binary: Sequence[_Input], tail_bytes: int, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Return the binary inputs' bytes by name, in their order; they must take up what follows the JSON."""
    sizes = {}
    at = 0
    for tensor in binary:
        given = tensor.parameters[BINARY_SIZE]
        spec = specs[tensor.name]
        needed = tensor.shape[0] * spec.row_bytes
        upto = "up to " if spec.is_bytes else ""
        fits = type(given) is int and at + given <= tail_bytes
        if spec.is_bytes and fits:
            elements.require_packed_bytes(spec, given, tensor.shape[0], BINARY_SIZE)
        elif not fits or given != needed:
            raise InvalidRequest(
                f"input {tensor.name} has {BINARY_SIZE} {_shown(given)}; its shape needs {upto}{needed} bytes,"
                f" and {tail_bytes - at} are left in the body"
            )
        sizes[tensor.name] = given
        at += given
    if at != tail_bytes:
        raise InvalidRequest(f"{tail_bytes - at} bytes of the body belong to no input; {BINARY_SIZE} must cover all")
    return sizes


def _place(tensor: _Input, spec: TensorSpec) -> RegionPlace:
    place = region_place(f"input {tensor.name}", tensor.parameters)
    assert place is not None
    packed_bytes(tensor, spec, place.byte_size, REGION)
    return place


def _data(tensor: _Input, decode: Callable[[msgspec.Raw], object]) -> object:
    try:
        return decode(tensor.data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"input {tensor.name}: its data is no {tensor.datatype} ({error})") from error
    except RecursionError as error:
        raise InvalidRequest(f"input {tensor.name}: its data is nested too deeply; send it flat") from error


def _from_json(tensor: _Input, spec: TensorSpec) -> memoryview:
    datatype = FROM_DTYPE[spec.dtype]
    if spec.is_bytes:
        strings = _data(tensor, msgspec.json.decode)
        return elements.from_json(strings, spec, tensor.shape[0], tensor.parameters)
    if datatype in BINARY_ONLY:
        raise InvalidRequest(f"input {tensor.name} is {datatype}, which JSON cannot carry; send it as binary data")
    needed = math.prod(tensor.shape)
    try:
        given = np.asarray(_data(tensor, _decode_numbers))
        fits = given.dtype.kind in _JSON_KINDS[np.dtype(spec.dtype).kind]
        with np.errstate(over="ignore"):  # to infinity, as every cast
            values = given.astype(numpy_dtype(spec.dtype), casting="unsafe") if fits else None
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"input {tensor.name}: its data is no regular array ({error})") from error
    if values is None or (given.dtype.kind in "iu" and np.dtype(spec.dtype).kind in "iu" and (values != given).any()):
        raise InvalidRequest(f"input {tensor.name}: its data holds values that are no {datatype}")
    if values.size != needed:
        raise InvalidRequest(f"input {tensor.name} has {values.size} values; shape {tensor.shape} needs {needed}")
    return memoryview(values.tobytes())


_JSON_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # of the model's dtype: which kinds of JSON data it takes


def _wanted(request: _Request, outputs: Sequence[TensorSpec]) -> tuple[WantedOutput, ...]:
    binary = bool(request.parameters.get("binary_data_output", False))
    asked = request.outputs
    if not asked:
        return tuple(WantedOutput(spec.name, binary) for spec in outputs)
    places = output_places(((output.name, output.parameters) for output in asked), outputs)
    return tuple(
        WantedOutput(
            output.name,
            bool(output.parameters.get("binary_data", binary)),
            found.place,
            output.parameters.get(elements.CONTENT_TYPE) == elements.BASE64,
        )
        for output, found in zip(asked, places, strict=True)
    )
