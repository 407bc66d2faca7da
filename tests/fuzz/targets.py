"""What is fuzzed. A target takes any bytes, and fails on what is no error of ours or does not come back alike.

A target is a plain function, so that a corpus is replayed where there is no fuzzer.
"""

import asyncio
import struct
from contextlib import suppress
from dataclasses import replace

import msgspec
import numpy as np

from headrace.door_messages import (
    LENGTH,
    MOST_ANSWERED_BYTES,
    MOST_ASKED_BYTES,
    body_bytes,
    decode_answer,
    decode_ask,
    encode,
)
from headrace.errors import InvalidRequest, TransportFailed
from headrace.frontend.http.body import Body
from headrace.frontend.http.head import Head, Refused, header_number, parse_head
from headrace.frontend.http.stream import END
from headrace.tensors import TensorSpec
from headrace.wire import v2, v2_call
from headrace.wire.datatypes import FROM_DTYPE, TO_DTYPE
from headrace.wire.grpc import codec
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.places import RegionPlace
from tests.frontend.fakes import FakeLink, front_of
from tests.frontend.test_http_fuzz import connect, send, settle, statuses

SPLIT = struct.Struct("<H")
TWO = (
    TensorSpec(name="x", dtype="float32", features=(2,)),
    TensorSpec(name="n", dtype="int64", features=()),
)
ONE_OF_EACH = tuple(TensorSpec(name=name, dtype=dtype, features=(1,)) for name, dtype in TO_DTYPE.items())
MODELS = (TWO, ONE_OF_EACH)
MOST_BODY_BYTES = 4096


def v2_request(data):
    """Decode a request's JSON: a byte chooses the model, two say how many raw bytes follow, the rest is JSON."""
    if len(data) < 3:
        return
    specs = MODELS[data[0] % len(MODELS)]
    (tail_bytes,) = SPLIT.unpack_from(data, 1)
    try:
        request = v2.decode(data[3:], tail_bytes, specs, specs)
    except InvalidRequest:
        return
    assert sorted([*request.inline, *request.binary, *request.regions]) == list(range(len(specs)))
    tensors = request.gather(memoryview(bytes(tail_bytes)))
    assert sum(len(tensors[number]) for number in request.binary) == tail_bytes
    for number, found in tensors.items():
        assert len(found) == request.rows * specs[number].row_bytes
    again = v2.decode(*_as_binary(request, tensors, specs), specs, specs)
    assert (again.id, again.rows, again.regions) == (request.id, request.rows, request.regions)
    assert (again.timeout_us, again.priority, again.outputs) == (request.timeout_us, request.priority, request.outputs)
    if request.rows <= 64 and not request.regions:
        _answers_alike(request, tensors, specs)


def _as_binary(request, tensors, specs):
    """Return the JSON of the same request with all tensors behind it, and how long they are."""
    inputs = []
    for number, spec in enumerate(specs):
        place = request.regions.get(number)
        parameters = _region(place) if place else {"binary_data_size": len(tensors[number])}
        shape = [request.rows, *spec.features]
        inputs.append({"name": spec.name, "shape": shape, "datatype": FROM_DTYPE[spec.dtype], "parameters": parameters})
    outputs = [
        {"name": wanted.name, "parameters": {"binary_data": wanted.binary} | _region(wanted.place)}
        for wanted in request.outputs
    ]
    parameters = {"timeout": request.timeout_us, "priority": request.priority}
    told = {"id": request.id, "inputs": inputs, "outputs": outputs, "parameters": parameters}
    return msgspec.json.encode(told), sum(map(len, tensors.values()))


def _region(place):
    if place is None:
        return {}
    return {
        "shared_memory_region": place.region,
        "shared_memory_offset": place.offset,
        "shared_memory_byte_size": place.byte_size,
    }


def _answers_alike(request, tensors, specs):
    """Check that a response which holds the inputs gives a client of ours the same bytes."""
    outputs = {spec.name: tensors[number] for number, spec in enumerate(specs)}
    answer = v2.encode(request, "m", "1", outputs, specs)
    if b"null" in answer.json:  # JSON has no NaN and no infinity: that is what binary is for
        return
    for output in v2_call.decode_answer(answer.json + b"".join(answer.tensors), len(answer.json)):
        assert output.array.shape[0] == request.rows
        np.testing.assert_array_equal(
            output.array.reshape(-1).view(np.uint8), np.frombuffer(outputs[output.name], np.uint8)
        )


def v2_answer(data):
    """Have our client decode whatever a server says: two bytes say how long the JSON is."""
    if len(data) < SPLIT.size:
        return
    (size,) = SPLIT.unpack_from(data)
    body = data[SPLIT.size :]
    for header_bytes in (None, size):
        with suppress(TransportFailed):
            for output in v2_call.decode_answer(body, header_bytes):
                assert output.array.nbytes <= 64 * len(body)
    with suppress(TransportFailed):
        v2_call.decode_metadata(body)
    assert v2_call.error_text(body)


def grpc_request(data):
    """Decode a ModelInferRequest, which the protobuf library must understand alike."""
    try:
        parsed = codec.parse(data)
    except InvalidRequest:
        return
    whole = pb.ModelInferRequest.FromString(data)
    assert list(whole.raw_input_contents) == [bytes(raw) for raw in parsed.raw]
    for specs in MODELS:
        try:
            request = codec.decode(parsed, specs, specs)
        except InvalidRequest:
            continue
        _grpc_alike(request, specs)


def _grpc_alike(request, specs):
    message = pb.ModelInferRequest(id=request.id)
    outputs = []
    for spec, found in zip(specs, request.inputs, strict=True):
        shape = [request.rows, *spec.features]
        tensor = message.inputs.add(name=spec.name, datatype=FROM_DTYPE[spec.dtype], shape=shape)
        if isinstance(found, RegionPlace):
            _put_region(tensor, found)
        else:
            assert len(found) == request.rows * spec.row_bytes
            message.raw_input_contents.append(bytes(found))
        outputs.append(memoryview(b"") if isinstance(found, RegionPlace) else found)
    for wanted in request.outputs:
        tensor = message.outputs.add(name=specs[wanted.number].name)
        if wanted.place is not None:
            _put_region(tensor, wanted.place)
    message.parameters["timeout"].int64_param = request.timeout_us
    message.parameters["priority"].int64_param = request.priority
    again = codec.decode(codec.parse(message.SerializeToString()), specs, specs)
    assert again == request
    response = codec.encode(request, "m", "1", outputs, specs)
    told = pb.ModelInferResponse.FromString(response.message())
    assert [tensor.name for tensor in told.outputs] == [specs[wanted.number].name for wanted in request.outputs]
    assert pb.ModelStreamInferResponse.FromString(response.stream_message()).infer_response == told


def _put_region(tensor, place):
    tensor.parameters["shared_memory_region"].string_param = place.region
    tensor.parameters["shared_memory_offset"].int64_param = place.offset
    tensor.parameters["shared_memory_byte_size"].int64_param = place.byte_size


def http_head(data):
    """Read a head, up to the first empty line; what can be read is written out and read again."""
    begin, end, _ = data.partition(END)
    try:
        head = parse_head(begin + end)
    except Refused:
        return
    assert head.length is None or head.length >= 0
    with suppress(InvalidRequest):
        header_number(head.headers, v2.HEADER_LENGTH)
    version = "1.0" if head.is_http_1_0 else "1.1"
    lines = [f"{head.method} {head.path} HTTP/{version}", *(f"{name}: {value}" for name, value in head.headers.items())]
    again = parse_head("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
    told = {name: value.rstrip(" \t") for name, value in head.headers.items()}  # joined, it may end in ", "
    assert again == replace(head, headers=told)


class _Cut:
    """A stream whose bytes come in pieces of one length, and then no more."""

    def __init__(self, data, size):
        self._pieces = [data[at : at + size] for at in range(0, len(data), size)][::-1]

    def say(self, data):
        pass

    async def some(self, deadline):
        if not self._pieces:
            raise TimeoutError
        return self._pieces.pop()


def http_chunks(data):
    """Read a body that comes in chunks: the first byte says how it is cut, which must make no difference."""
    if len(data) < 2:
        return
    whole = _body_of(data[1:], len(data))
    cut = _body_of(data[1:], 1 + data[0] % 16)
    assert (whole is None) == (cut is None)
    if whole is None:
        return
    assert whole == cut
    assert len(whole) <= MOST_BODY_BYTES
    size = 1 + data[0] % 7
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    again = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    assert _body_of(again, len(again)) == whole


def _body_of(data, size):
    """Return the body that chunks make; None if they are refused."""
    head = Head("POST", "/", {}, keep_alive=True, is_http_1_0=False, length=None, expects_continue=False)
    body = Body(_Cut(data, size), head, MOST_BODY_BYTES, 0)
    try:
        body.read().send(None)  # nothing in it waits
    except StopIteration as ended:
        return bytes(ended.value)
    except Refused:
        return None
    raise AssertionError("the body waits for something")


def http_connection(data):
    """Send bytes to a whole front, cut where the first bytes say: all is answered or closed, and all rows come back."""
    if len(data) < 4:
        return
    failures = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        link = FakeLink()
        front = front_of(link, max_body_bytes=MOST_BODY_BYTES)
        transport = connect(front)
        await send(transport, data[3:], list(data[:3]))
        statuses(transport)
        await front.close()
        await settle()
        assert transport.is_closed
        assert link.leases.free_rows == link.total
        assert not front._connections

    asyncio.run(run())
    assert not failures, failures


def door(data):
    """Read what is said at the ring's socket, by either side."""
    if len(data) < LENGTH.size:
        return
    for most, decode in ((MOST_ASKED_BYTES, decode_ask), (MOST_ANSWERED_BYTES, decode_answer)):
        with suppress(TransportFailed):
            assert 0 <= body_bytes(data[: LENGTH.size], most) <= most
        try:
            message = decode(data[LENGTH.size :])
        except TransportFailed:
            continue
        assert decode(encode(message)[LENGTH.size :]) == message


TARGETS = {
    target.__name__: target
    for target in (v2_request, v2_answer, grpc_request, http_head, http_chunks, http_connection, door)
}
