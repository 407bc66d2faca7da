"""The client's half of the codec: what it writes the server's half reads, and the other way round."""

import msgspec
import numpy as np
import pytest

from headrace.errors import TransportFailed
from headrace.tensors import TensorSpec
from headrace.wire import v2
from headrace.wire.v2_call import CallOptions, decode_answer, decode_metadata, encode_call, error_text

VALUES = TensorSpec(name="values", dtype="float32", features=(3,))
IDS = TensorSpec(name="ids", dtype="int64", features=(2,))
HALF = TensorSpec(name="half", dtype="bfloat16", features=(2,))


def test_a_request_is_what_the_server_reads():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)[::2]  # not contiguous
    ids = np.arange(4).reshape(2, 2)
    options = CallOptions(request_id="r", timeout_us=5, priority=2)
    call = encode_call([values, ids], [VALUES, IDS], options)
    tail = memoryview(b"".join(call.parts[1:]))
    read = v2.decode(call.parts[0], len(tail), [VALUES, IDS], [HALF])
    assert read.id == "r"
    assert read.rows == 2
    assert read.inline == {}
    data = read.gather(tail)
    assert {number: bytes(part) for number, part in data.items()} == {0: values.tobytes(), 1: ids.tobytes()}
    assert read.outputs == (v2.WantedOutput("half", binary=True),)
    assert (read.timeout_us, read.priority) == (5, 2)
    assert msgspec.json.decode(call.parts[0])["parameters"] == {"binary_data_output": True, "timeout": 5, "priority": 2}


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_an_answer_is_what_the_server_writes(binary):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.arange(4, dtype=np.uint16).reshape(2, 2)
    wanted = (v2.WantedOutput("half", binary=True), v2.WantedOutput("values", binary=binary))
    request = v2.InferRequest(None, 2, {}, (0,), wanted)
    outputs = {"values": memoryview(values).cast("B"), "half": memoryview(half).cast("B")}
    encoded = v2.encode(request, "m", "1", outputs, [VALUES, HALF])
    body = b"".join((encoded.json, *encoded.tensors))
    first, second = decode_answer(body, len(encoded.json))
    assert (first.name, first.dtype, second.name, second.dtype) == ("half", "bfloat16", "values", "float32")
    np.testing.assert_array_equal(first.array, half)
    np.testing.assert_array_equal(second.array, values)


def answer(**changes):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}} | changes
    return msgspec.json.encode({"outputs": [tensor]})


@pytest.mark.parametrize(
    ("head", "tail", "words"),
    [
        (b"{", b"", "no infer response"),
        (b"[" * 100_000, b"", "no infer response"),
        (answer(), b"1234567", "have 8 bytes"),
        (answer(parameters={}), b"12345678", "have None bytes"),
        (answer(shape=[1, 3]), b"12345678", "have 8 bytes"),
        (answer(shape=[-1, -2]), b"12345678", "neither negative"),
        (answer(datatype="STRING"), b"12345678", "datatype STRING; this client knows"),
        (answer(data=[1, 2, 3]), b"", "cannot reshape"),
        (answer(data=["a", "b"]), b"", "could not convert"),
        (answer(datatype="?").replace(b"?", b"\xff"), b"", "no infer response"),
        (answer(shape=[2**63 - 1] * 300), b"", "300 dimensions"),
        (answer(shape=[2**63]), b"", "more than memory has"),
    ],
    ids=[
        *("no JSON", "nested", "short", "no size", "shape", "negative", "datatype", "data", "text"),
        *("no UTF-8", "many dimensions", "large"),
    ],
)
def test_an_answer_that_is_none_is_refused(head, tail, words):
    with pytest.raises(TransportFailed, match=words):
        decode_answer(head + tail, len(head))


def test_a_header_longer_than_the_answer_is_refused():
    with pytest.raises(TransportFailed, match="header of 9"):
        decode_answer(b"{}", 9)


def test_metadata_says_what_a_row_is():
    body = msgspec.json.encode(
        {
            "name": "m",
            "inputs": [{"name": "ids", "datatype": "INT64", "shape": [-1, -1]}],
            "outputs": [{"name": "half", "datatype": "BF16", "shape": [-1, 2]}],
        }
    )
    tensors = decode_metadata(body)
    assert tensors.inputs == (TensorSpec(name="ids", dtype="int64", features=(-1,)),)
    assert tensors.outputs == (HALF,)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": "no"}', "no"),
        (b'{"detail": "no"}', '{"detail": "no"}'),
        (b"\xff", "\ufffd"),
        (b"", "the server gave no reason"),
    ],
)
def test_an_errors_text_is_found_in_whatever_came(body, text):
    assert error_text(body) == text
