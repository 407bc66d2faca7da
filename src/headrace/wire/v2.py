"""KServe v2 over HTTP: requests to tensors' bytes and back, as JSON and with the binary extension.

Tensors travel as raw little-endian bytes, row-major, whatever form they came in; nothing here knows torch. Source: Open
Inference Protocol (required API) and Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire.datatypes import BINARY_ONLY, FROM_DTYPE, numpy_dtype

HEADER_LENGTH = "Inference-Header-Content-Length"
ERROR_CLASS = "Headrace-Error"  # of `headrace.errors`: our own client raises it again


@dataclass(frozen=True, slots=True)
class WantedOutput:
    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded request: raw bytes of each of the model's inputs, in the model's order."""

    id: str | None
    rows: int
    inputs: tuple[memoryview, ...]
    outputs: tuple[WantedOutput, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body, and how much of it is JSON if tensors' bytes follow."""

    body: bytes
    header_bytes: int | None


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] | None = None


_decode = msgspec.json.Decoder(_Request).decode


def decode(
    body: bytes | memoryview, header_bytes: int | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """Read an infer request for a model of these tensors; `header_bytes` is the binary extension's header, if given.

    Raises InvalidRequest, naming the field, the value and the limit.
    """
    view = memoryview(body)
    if header_bytes == 0:
        return _raw(view, inputs, outputs)
    if header_bytes is not None and not 0 < header_bytes <= len(view):
        raise InvalidRequest(f"{HEADER_LENGTH} is {header_bytes}; it must be 0 to the body's {len(view)} bytes")
    request = _parsed(view[:header_bytes])
    tail = view[header_bytes:] if header_bytes is not None else view[:0]
    given = _by_name(request.inputs, inputs)
    raw = _tensors(request.inputs, tail, {spec.name: spec for spec in inputs})
    rows = {given[spec.name].shape[0] for spec in inputs}
    if len(rows) != 1:
        raise InvalidRequest(f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all need the same number")
    return InferRequest(
        id=request.id or None,  # perf_analyzer sends "id": ""
        rows=rows.pop(),
        inputs=tuple(raw[spec.name] for spec in inputs),
        outputs=_wanted(request, outputs),
    )


def encode(
    request: InferRequest, model: str, version: str, outputs: Mapping[str, memoryview], specs: Sequence[TensorSpec]
) -> Encoded:
    """Write the response: `outputs` are raw bytes by name, of `request.rows` rows each."""
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
        if wanted.binary or FROM_DTYPE[spec.dtype] in BINARY_ONLY:
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail.append(bytes(data))
        else:
            tensor["data"] = np.frombuffer(data, numpy_dtype(spec.dtype)).tolist()
        told.append(tensor)
    head: dict[str, object] = {"model_name": model, "model_version": version, "outputs": told}
    if request.id is not None:
        head["id"] = request.id
    json = msgspec.json.encode(head)
    return Encoded(b"".join([json, *tail]), len(json) if tail else None)


def _parsed(json: memoryview) -> _Request:
    try:
        return _decode(json)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the request is no v2 infer request: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the request's JSON is nested too deeply; send data flat, or as binary tensors") from error


def _raw(view: memoryview, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """Read a body that is the only input's bytes and nothing else."""
    if len(inputs) != 1:
        raise InvalidRequest(
            f"a raw body ({HEADER_LENGTH}: 0) can fill one input; the model has {len(inputs)}, so send JSON before it"
        )
    size = inputs[0].row_bytes
    rows, rest = divmod(len(view), size)
    if rest or not rows:
        raise InvalidRequest(
            f"a raw body of {len(view)} bytes; a row of {inputs[0].name} has {size}, so send a multiple"
        )
    return InferRequest(None, rows, (view,), tuple(WantedOutput(spec.name, binary=True) for spec in outputs))


def _by_name(given: Sequence[_Input], specs: Sequence[TensorSpec]) -> dict[str, _Input]:
    names = [tensor.name for tensor in given]
    wanted = [spec.name for spec in specs]
    if sorted(names) != sorted(wanted):
        raise InvalidRequest(f"inputs {', '.join(names) or 'none'} were given; the model takes {', '.join(wanted)}")
    return {tensor.name: tensor for tensor in given}


def _tensors(given: Sequence[_Input], tail: memoryview, specs: Mapping[str, TensorSpec]) -> dict[str, memoryview]:
    """Return each input's bytes. Binary ones lie behind the JSON in the order in which the inputs are named there."""
    raw = {}
    at = 0
    for tensor in given:
        spec = specs[tensor.name]
        _require_match(tensor, spec)
        needed = tensor.shape[0] * spec.row_bytes
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            raw[tensor.name] = _from_json(tensor, spec)
            continue
        if tensor.data is not None:
            raise InvalidRequest(f"input {tensor.name} has both data and binary_data_size; send one")
        if type(size) is not int or size != needed or at + size > len(tail):
            raise InvalidRequest(
                f"input {tensor.name} has binary_data_size {size}; its shape needs {needed} bytes, and"
                f" {max(0, len(tail) - at)} are left in the body"
            )
        raw[tensor.name] = tail[at : at + size]
        at += size
    if at != len(tail):
        raise InvalidRequest(f"{len(tail) - at} bytes of the body belong to no input; binary_data_size must cover all")
    return raw


def _require_match(tensor: _Input, spec: TensorSpec) -> None:
    datatype = FROM_DTYPE[spec.dtype]
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {tensor.name} has datatype {tensor.datatype}; the model takes {datatype}")
    if len(tensor.shape) != len(spec.features) + 1 or tuple(tensor.shape[1:]) != spec.features or tensor.shape[0] < 1:
        wanted = ", ".join(["rows", *map(str, spec.features)])
        raise InvalidRequest(
            f"input {tensor.name} has shape {tensor.shape}; the model takes [{wanted}], rows at least 1"
        )
    if "shared_memory_region" in tensor.parameters:
        raise InvalidRequest(f"input {tensor.name} names a shared memory region; this server offers none")


def _from_json(tensor: _Input, spec: TensorSpec) -> memoryview:
    datatype = FROM_DTYPE[spec.dtype]
    if datatype in BINARY_ONLY:
        raise InvalidRequest(f"input {tensor.name} is {datatype}, which JSON cannot carry; send it as binary data")
    if tensor.data is None:
        raise InvalidRequest(f"input {tensor.name} has neither data nor binary_data_size")
    needed = math.prod(tensor.shape)
    try:
        given = np.asarray(tensor.data)
        fits = given.dtype.kind in _JSON_KINDS[np.dtype(spec.dtype).kind]
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
    names = [spec.name for spec in outputs]
    binary = bool(request.parameters.get("binary_data_output", False))
    if not request.outputs:
        return tuple(WantedOutput(name, binary) for name in names)
    wanted = []
    for output in request.outputs:
        if output.name not in names:
            raise InvalidRequest(f"output {output.name} was asked for; the model gives {', '.join(names)}")
        if "classification" in output.parameters or "shared_memory_region" in output.parameters:
            raise InvalidRequest(f"output {output.name}: classification and shared memory are not offered")
        wanted.append(WantedOutput(output.name, bool(output.parameters.get("binary_data", binary))))
    return tuple(wanted)
