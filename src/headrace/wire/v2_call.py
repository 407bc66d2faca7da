"""The client's half of `wire.v2`: infer requests out, answers in, with the binary extension. Arrays are numpy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidRequest, TransportFailed
from headrace.tensors import BYTES, TensorSpec
from headrace.wire.datatypes import FROM_DTYPE, TO_DTYPE, numpy_dtype
from headrace.wire.elements import from_json, objects, pack, split

MOST_DIMENSIONS = 64  # of numpy's arrays
LARGEST_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class EncodedCall:
    """A body in parts, so that tensors' bytes need not be copied: JSON, then each input's."""

    parts: tuple[bytes | memoryview, ...]

    @property
    def header_bytes(self) -> int:
        return len(self.parts[0])

    @property
    def total_bytes(self) -> int:
        return sum(len(part) for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """The reserved parameters of a request; 0 and None leave them out."""

    request_id: str | None = None
    timeout_us: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of an answer; for bfloat16 the array holds the bits, as uint16."""

    name: str
    dtype: str
    array: NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What a server says of a model's inputs and outputs; -1 among the features stands for any size."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Any = None


class _Metadata(msgspec.Struct):
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _Answer(msgspec.Struct):
    outputs: list[_Tensor]


_metadata = msgspec.json.Decoder(_Metadata).decode
_answer = msgspec.json.Decoder(_Answer).decode


def encode_call(arrays: Sequence[NDArray[Any]], specs: Sequence[TensorSpec], options: CallOptions) -> EncodedCall:
    """Write a request for these inputs, [rows, *features] each and of the dtypes that travel; BYTES are objects."""
    parameters: dict[str, object] = {"binary_data_output": True}
    if options.timeout_us:
        parameters["timeout"] = options.timeout_us
    if options.priority:
        parameters["priority"] = options.priority
    data = [memoryview(pack(array.flat)) if array.dtype == object else _bytes_of(array) for array in arrays]
    inputs = [
        {
            "name": spec.name,
            "shape": list(array.shape),
            "datatype": FROM_DTYPE[spec.dtype],
            "parameters": {"binary_data_size": len(each)},
        }
        for array, spec, each in zip(arrays, specs, data, strict=True)
    ]
    head: dict[str, object] = {"inputs": inputs, "parameters": parameters}
    if options.request_id is not None:
        head["id"] = options.request_id
    return EncodedCall((msgspec.json.encode(head), *data))


def decode_metadata(body: bytes) -> Tensors:
    """Read a model's metadata. Raises TransportFailed for what is none, and for datatypes that are not known."""
    told = _parsed(_metadata, body, "model metadata")
    return Tensors(inputs=tuple(map(_spec, told.inputs)), outputs=tuple(map(_spec, told.outputs)))


def decode_answer(body: bytes, header_bytes: int | None) -> tuple[Output, ...]:
    """Read the answer to a request. Raises TransportFailed for what is none."""
    view = memoryview(body)
    if header_bytes is not None and not 0 < header_bytes <= len(view):
        raise TransportFailed(f"an answer of {len(view)} bytes with a header of {header_bytes}")
    told = _parsed(_answer, view[:header_bytes], "infer response")
    at = len(view) if header_bytes is None else header_bytes
    outputs = []
    for tensor in told.outputs:
        spec = _spec(tensor)
        _require_shape(tensor)
        if tensor.data is None:
            data = _binary(tensor, spec, view[at:])
            at += len(data)
        else:
            data = tensor.data
        outputs.append(Output(spec.name, spec.dtype, _array(data, tensor, spec)))
    return tuple(outputs)


def _require_shape(tensor: _Tensor) -> None:
    """Check what is multiplied and told later: JSON may hold any number of numbers of any length."""
    if len(tensor.shape) > MOST_DIMENSIONS:
        raise TransportFailed(
            f"output {tensor.name} has {len(tensor.shape)} dimensions; an array has {MOST_DIMENSIONS}"
        )
    if not all(0 <= size <= LARGEST_SIZE for size in tensor.shape):
        raise TransportFailed(
            f"output {tensor.name} has shape {tensor.shape}; a size can be neither negative nor more than memory has"
        )


def _binary(tensor: _Tensor, spec: TensorSpec, tail: memoryview) -> memoryview:
    size = tensor.parameters.get("binary_data_size")
    if spec.is_bytes and type(size) is int and 0 <= size <= len(tail):
        return tail[:size]
    needed = 0 if spec.is_bytes else math.prod(tensor.shape) * numpy_dtype(spec.dtype).itemsize
    if size != needed or needed > len(tail):
        raise TransportFailed(
            f"output {tensor.name}, shape {tensor.shape}, is said to have {size} bytes; it needs {needed}, and"
            f" {len(tail)} are there"
        )
    return tail[:needed]


def _array(data: Any, tensor: _Tensor, spec: TensorSpec) -> NDArray[Any]:  # noqa: ANN401
    if spec.is_bytes:
        return _elements(data, tensor)
    dtype = numpy_dtype(spec.dtype)
    try:
        flat = np.frombuffer(data, dtype) if isinstance(data, memoryview) else np.asarray(data, dtype)
        return flat.reshape(tensor.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise TransportFailed(f"output {tensor.name}, shape {tensor.shape}: {error}") from error


def _elements(data: Any, tensor: _Tensor) -> NDArray[Any]:  # noqa: ANN401
    """Return elements of BYTES as an array of objects, which are `bytes`."""
    try:
        if not isinstance(data, memoryview):
            spec = TensorSpec(name=tensor.name, dtype=BYTES, features=tuple(tensor.shape[1:]))
            data = from_json(data, spec, tensor.shape[0], tensor.parameters)
        return objects([bytes(element) for element in split(data, tensor.name)], tensor.shape)
    except (InvalidRequest, ValueError, IndexError) as error:
        raise TransportFailed(f"output {tensor.name}, shape {tensor.shape}: {error}") from error


def error_text(body: bytes) -> str:
    """Return what an error's body says, whatever it is."""
    try:
        told = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        told = None
    if isinstance(told, dict) and isinstance(told.get("error"), str) and told["error"]:
        return str(told["error"])
    return body[:200].decode(errors="replace") or "the server gave no reason"


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _parsed(parse: Any, body: bytes | memoryview, what: str) -> Any:  # noqa: ANN401
    try:
        return parse(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransportFailed(f"the server's answer is no {what}: {error}") from error


def _spec(tensor: _Tensor) -> TensorSpec:
    if tensor.datatype == FROM_DTYPE[BYTES]:
        most = tensor.parameters.get("max_bytes")  # a server of another make does not say it
        return TensorSpec(
            name=tensor.name,
            dtype=BYTES,
            features=tuple(tensor.shape[1:]),
            max_bytes=most if type(most) is int else 0,
        )
    dtype = TO_DTYPE.get(tensor.datatype)
    if dtype is None:
        raise TransportFailed(
            f"tensor {tensor.name} has datatype {tensor.datatype}; this client knows {', '.join(TO_DTYPE)} and BYTES"
        )
    return TensorSpec(name=tensor.name, dtype=dtype, features=tuple(tensor.shape[1:]))
