"""The null server's model: it answers a row with a fingerprint of it, so that wrong answers can be told.

Spoken is KServe v2, over HTTP (JSON and binary tensors) and as messages of gRPC.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from headrace.target.law import MODEL
from headrace.wire.grpc import inference_pb2 as pb

INPUT, OUTPUT = "input", "output"
OUTPUTS = 8  # values of an answer's row
MOST_ROWS = 1024  # of a request, as the configuration says; nothing depends on it
SAMPLED_BYTES = 4096  # at either end of a row; the rest of it is read and not looked at

Values = npt.NDArray[np.float32]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str = OUTPUT
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_decode = msgspec.json.Decoder(_Request).decode


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    header_bytes: int | None = None  # of the JSON in front of binary tensors


class NullModel:
    """One input, FP32 [-1, features]; one output, FP32 [-1, 8]."""

    def __init__(self, input_bytes: int) -> None:
        self._features = input_bytes // 4

    def metadata(self) -> bytes:
        return msgspec.json.encode(
            {
                "name": MODEL,
                "versions": ["1"],
                "platform": "headrace_null",
                "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, self._features]}],
                "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, OUTPUTS]}],
            }
        )

    def config(self) -> bytes:
        """Return Triton's model configuration, without which perf_analyzer does not begin."""
        return msgspec.json.encode(
            {
                "name": MODEL,
                "platform": "headrace_null",
                "max_batch_size": MOST_ROWS,
                "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": [self._features]}],
                "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [OUTPUTS]}],
            }
        )

    def answer(self, body: bytes, header_bytes: int | None, *, wrong: bool) -> tuple[Reply, int]:
        """Return the answer to a body, and a number that tells inputs apart. What is no request gets status 400."""
        try:
            request = _decode(body[:header_bytes])
            data = self._data(request, body, header_bytes)
        except (msgspec.MsgspecError, ValueError, IndexError) as error:
            return Reply(400, msgspec.json.encode({"error": str(error)})), 0
        values, key = self._values(data, wrong=wrong)
        return _reply(request, values), key

    def answer_message(self, message: bytes, *, wrong: bool) -> tuple[bytes, int]:
        """Do the same for a ModelInferRequest whose input is raw. Raises ValueError for what is none."""
        try:
            request = pb.ModelInferRequest.FromString(message)
        except DecodeError as error:
            raise ValueError(f"not a ModelInferRequest: {error}") from error
        if len(request.inputs) != 1 or len(request.raw_input_contents) != 1:
            raise ValueError(f"{len(request.inputs)} inputs, {len(request.raw_input_contents)} of them raw; 1 is taken")
        data = memoryview(request.raw_input_contents[0])
        self._require(list(request.inputs[0].shape), data)
        values, key = self._values(data, wrong=wrong)
        response = pb.ModelInferResponse(model_name=MODEL, model_version="1", id=request.id)
        response.outputs.add(name=OUTPUT, datatype="FP32", shape=values.shape)
        response.raw_output_contents.append(values.tobytes())
        return response.SerializeToString(), key

    def metadata_message(self) -> bytes:
        """Return the ModelMetadataResponse."""
        response = pb.ModelMetadataResponse(name=MODEL, versions=["1"], platform="headrace_null")
        response.inputs.add(name=INPUT, datatype="FP32", shape=[-1, self._features])
        response.outputs.add(name=OUTPUT, datatype="FP32", shape=[-1, OUTPUTS])
        return response.SerializeToString()

    def _values(self, data: memoryview, *, wrong: bool) -> tuple[Values, int]:
        size = self._features * 4
        prints = [_fingerprint(data[at : at + size]) for at in range(0, len(data), size)]
        return _values([~each & 0xFFFFFFFF for each in prints] if wrong else prints), hash(tuple(prints))

    def _data(self, request: _Request, body: bytes, header_bytes: int | None) -> memoryview:
        """Return the rows' bytes. Raises ValueError or IndexError for what the model does not take."""
        (tensor,) = request.inputs
        data = _raw(tensor) if tensor.data is not None else memoryview(body)[header_bytes or len(body) :]
        self._require(tensor.shape, data)
        return data

    def _require(self, shape: list[int], data: memoryview) -> None:
        rows = shape[0]
        if shape != [rows, self._features] or len(data) != rows * self._features * 4 or rows < 1:
            raise ValueError(f"input has {len(data)} bytes and shape {shape}, not [rows, {self._features}]")


def _raw(tensor: _Tensor) -> memoryview:
    return memoryview(np.asarray(tensor.data, dtype="<f4").tobytes())


def _fingerprint(row: memoryview) -> int:
    return zlib.crc32(row[-SAMPLED_BYTES:], zlib.crc32(row[:SAMPLED_BYTES]))


def _values(prints: list[int]) -> Values:
    """Return a row for each fingerprint: its eight hexadecimal digits, which no rounding can confuse."""
    digits = np.asarray(prints, dtype=np.uint32)[:, None] >> (4 * np.arange(OUTPUTS, dtype=np.uint32))
    return (digits & 15).astype("<f4")


def _reply(request: _Request, values: Values) -> Reply:
    output: dict[str, object] = {"name": OUTPUT, "datatype": "FP32", "shape": list(values.shape)}
    head: dict[str, object] = {"model_name": MODEL, "model_version": "1", "outputs": [output]}
    if request.id:
        head["id"] = request.id
    binary = request.parameters.get("binary_data_output", False)
    if not (request.outputs[0].parameters.get("binary_data", binary) if request.outputs else binary):
        output["data"] = values.reshape(-1).tolist()
        return Reply(200, msgspec.json.encode(head))
    output["parameters"] = {"binary_data_size": values.nbytes}
    json = msgspec.json.encode(head)
    return Reply(200, json + values.tobytes(), len(json))
