"""Elements of BYTES: packed as the protocol has them, in the cells of a table, as JSON, and as clients pack them."""

import base64
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from headrace.errors import InvalidRequest, TransportFailed
from headrace.tensors import BYTES, LENGTH_BYTES, TensorSpec
from headrace.wire import elements, v2
from headrace.wire.grpc import codec
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.v2_call import CallOptions, decode_answer, decode_metadata, encode_call

MOST = 40
NAMES = TensorSpec(name="names", dtype=BYTES, features=(1,), max_bytes=MOST)
PAIRS = TensorSpec(name="pairs", dtype=BYTES, features=(2,), max_bytes=MOST)
BLOBS = st.lists(st.binary(max_size=MOST), max_size=8)
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=MOST // 4), min_size=1, max_size=6)


def cells_of(count, filled=0):
    return memoryview(bytearray([filled]) * (count * (LENGTH_BYTES + MOST)))


def length(size):
    return struct.pack("<I", size)


def request(data=None, shape=(1,), *, name="names", output=None, **parameters):
    tensor = {"name": name, "datatype": "BYTES", "shape": list(shape), "parameters": parameters}
    tensor |= {} if data is None else {"data": data}
    outputs = {} if output is None else {"outputs": [{"name": name, "parameters": output}]}
    return json.dumps({"inputs": [tensor], **outputs}).encode()


def decoded(json_bytes, tail=b"", spec=NAMES):
    return v2.decode(json_bytes, len(tail), [spec], [spec])


def packed_of(json_bytes, tail=b"", spec=NAMES):
    return bytes(decoded(json_bytes, tail, spec).gather(memoryview(tail))[0])


@settings(deadline=None)
@given(BLOBS)
def test_what_is_packed_is_what_a_known_client_reads_and_writes(blobs):
    packed = bytes(elements.pack(blobs))
    assert list(deserialize_bytes_tensor(packed)) == blobs
    if blobs:
        assert serialize_byte_tensor(np.array(blobs, object)).item() == packed
    assert [bytes(each) for each in elements.split(memoryview(packed), "x")] == blobs


@settings(deadline=None)
@given(blobs=BLOBS, filled=st.integers(0, 255))
def test_elements_cross_a_table_whatever_lay_in_it_before(blobs, filled):
    rows = cells_of(len(blobs), filled)
    elements.fill(rows, memoryview(elements.pack(blobs)), NAMES)
    assert [bytes(each) for each in elements.cells(rows, NAMES)] == blobs
    assert bytes(elements.raw(rows, NAMES)) == bytes(elements.pack(blobs))


@settings(deadline=None)
@given(data=st.binary(max_size=60), count=st.integers(0, 4))
def test_anything_is_taken_whole_or_refused_and_never_written_beyond_its_rows(data, count):
    memory = bytearray(b"\x55" * ((count + 2) * (LENGTH_BYTES + MOST)))
    cell = LENGTH_BYTES + MOST
    rows = memoryview(memory)[cell : cell + count * cell]
    try:
        elements.fill(rows, memoryview(data), NAMES)
    except InvalidRequest:
        pass
    else:
        assert bytes(elements.pack(elements.cells(rows, NAMES))) == data
    assert memory[:cell] == memory[cell + count * cell :] == b"\x55" * cell


@pytest.mark.parametrize(
    ("packed", "count", "words"),
    [
        (length(3) + b"abc" + length(9) + b"abc", 2, "an element ends 6 bytes behind them"),
        (length(3) + b"abc" + b"\0\0", 2, "an element ends 2 bytes behind them"),
        (length(1) + b"a", 2, "tensor names has 1 elements; its shape needs 2"),
        (3 * (length(1) + b"a"), 2, "tensor names has 3 elements; its shape needs 2"),
        (length(MOST + 1) + b"a" * (MOST + 1), 1, f"element 0 of tensor names has {MOST + 1} bytes, and the model"),
    ],
)
def test_what_is_wrong_with_elements_is_said(packed, count, words):
    with pytest.raises(InvalidRequest, match=words):
        elements.fill(cells_of(count), memoryview(packed), NAMES)


def test_a_length_that_the_other_process_has_spoilt_is_refused():
    rows = cells_of(2)
    rows[:4] = length(MOST + 1)
    with pytest.raises(InvalidRequest, match=f"element 0 of tensor names has {MOST + 1} bytes"):
        list(elements.cells(rows, NAMES))


@settings(deadline=None)
@given(texts=TEXTS, nested=st.booleans(), as_base64=st.booleans())
def test_strings_cross_as_json_text_and_as_base64(texts, nested, as_base64):
    data = [base64.b64encode(text.encode()).decode() for text in texts] if as_base64 else texts
    parameters = {"content_type": "base64"} if as_base64 else {}
    shape = (len(texts), 1) if nested else (len(texts),)
    given_data = [[each] for each in data] if nested else data
    packed = packed_of(request(given_data, shape, **parameters))
    assert packed == bytes(elements.pack(text.encode() for text in texts))
    asked = request(given_data, shape, output=parameters, **parameters)
    encoded = v2.encode(decoded(asked), "m", "1", {"names": memoryview(packed)}, [NAMES])
    (output,) = json.loads(encoded.json)["outputs"]
    assert (output["datatype"], output["shape"], output["data"]) == ("BYTES", [len(texts), 1], data)
    assert output.get("parameters", {}) == parameters
    (read,) = decode_answer(encoded.json, None)
    assert read.array.tolist() == [[text.encode()] for text in texts]


def test_elements_that_are_no_text_are_answered_as_base64_and_the_answer_says_so():
    blob = b"\xff\xd8\xff"
    encoded = v2.encode(decoded(request(["x"])), "m", "1", {"names": memoryview(elements.pack([blob]))}, [NAMES])
    (output,) = json.loads(encoded.json)["outputs"]
    assert output["parameters"] == {"content_type": "base64"}
    assert decode_answer(encoded.json, None)[0].array.tolist() == [[blob]]


@settings(deadline=None)
@given(BLOBS.filter(bool))
def test_elements_cross_as_binary_data_from_our_client_to_the_server_and_back(blobs):
    array = np.empty((len(blobs), 1), object)
    array[:, 0] = blobs
    call = encode_call([array], [NAMES], CallOptions())
    head, tail = call.parts[0], b"".join(call.parts[1:])
    packed = packed_of(head, tail)
    assert packed == tail == bytes(elements.pack(blobs))
    answer = v2.encode(decoded(head, tail), "m", "1", {"names": memoryview(packed)}, [NAMES])
    body = answer.json + b"".join(answer.tensors)
    assert decode_answer(body, len(answer.json))[0].array.tolist() == [[blob] for blob in blobs]


@settings(deadline=None)
@given(blobs=st.lists(st.binary(max_size=MOST), min_size=2, max_size=2), raw=st.booleans())
def test_elements_cross_over_grpc_raw_and_in_contents(blobs, raw):
    message = pb.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="pairs", datatype="BYTES", shape=[1, 2])
    if raw:
        message.raw_input_contents.append(bytes(elements.pack(blobs)))
    else:
        tensor.contents.bytes_contents.extend(blobs)
    read = codec.decode(codec.parse(message.SerializeToString()), [PAIRS], [PAIRS])
    assert bytes(read.inputs[0]) == bytes(elements.pack(blobs))
    response = codec.encode(read, "m", "1", [read.inputs[0]], [PAIRS])
    answer = pb.ModelInferResponse.FromString(response.message())
    assert list(answer.outputs[0].shape) == [1, 2]
    assert list(deserialize_bytes_tensor(answer.raw_output_contents[0])) == blobs


def test_a_raw_body_is_the_one_element_without_its_length():
    read = v2.decode_raw(3, [NAMES], [NAMES])
    assert (read.rows, bytes(read.gather(memoryview(b"abc"))[0])) == (1, length(3) + b"abc")
    with pytest.raises(InvalidRequest, match=f"element 0 of tensor names has {MOST + 1} bytes, and the model takes"):
        v2.decode_raw(MOST + 1, [NAMES], [NAMES])


@pytest.mark.parametrize(
    ("json_bytes", "tail", "words"),
    [
        (request(["a", "b"]), b"", "input names has 2 strings; its shape needs 1"),
        (request([5]), b"", "its data must be strings"),
        (request([[["a"]]]), b"", "its data must be strings, nested by its shape or flat"),
        (request({"a": 1}), b"", "its data must be strings"),
        (request(["?"], content_type="base64"), b"", "a string that is no base64"),
        (request(["ä"], content_type="base64"), b"", "a string that is no base64"),
        (request(["\ud800"]), b"", "no v2 infer request"),
        (request(["a"], content_type="hex"), b"", "content_type 'hex'; it must be base64 or left out"),
        (request(["a"], (1, 2)), b"", r"input names has shape \[1, 2\]; the model takes \[rows, 1\]"),
        (request(["a"], (0,)), b"", "rows at least 1"),
        (request(binary_data_size=3), b"abc", f"1 rows of it have 4 to {4 + MOST}"),
        (request(binary_data_size=MOST + 5), bytes(MOST + 5), "raise max_bytes in the model's description"),
        (request(binary_data_size=9), b"abcd", "its shape needs up to 44 bytes, and 4 are left in the body"),
        (request(binary_data_size="9"), b"abcd", "binary_data_size '9'"),
        (request(binary_data_size=4), bytes(5), "1 bytes of the body belong to no input"),
        (request(shape=(1,), shared_memory_region="r", shared_memory_byte_size=99), b"", "99 bytes in shared_memory"),
        (request(["a"], (10**15,)), b"", "more than 2147483647 rows"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(json_bytes, tail, words):
    with pytest.raises(InvalidRequest, match=words):
        packed_of(json_bytes, tail)


@pytest.mark.parametrize("parameters", [{}, {"max_bytes": None}, {"max_bytes": "long"}, {"max_bytes": 2.5}])
def test_metadata_of_a_server_that_does_not_say_how_long_elements_may_be_is_read(parameters):
    told = {"name": "n", "datatype": "BYTES", "shape": [-1, 1], "parameters": parameters}
    (spec,) = decode_metadata(json.dumps({"inputs": [told], "outputs": []}).encode()).inputs
    assert spec == TensorSpec(name="n", dtype=BYTES, features=(1,), max_bytes=0)


@pytest.mark.parametrize(
    ("tensor", "tail"),
    [
        ({"parameters": {"binary_data_size": 8}}, length(9) + b"abcd"),
        ({"parameters": {"binary_data_size": 9}}, length(1) + b"abcd"),
        ({"parameters": {"binary_data_size": 10}}, 2 * (length(1) + b"a")),
        ({"data": ["a", "b"]}, b""),
        ({"data": 5}, b""),
    ],
)
def test_an_answer_that_is_none_is_our_servers_failure(tensor, tail):
    head = json.dumps({"outputs": [{"name": "n", "datatype": "BYTES", "shape": [1, 1], **tensor}]}).encode()
    with pytest.raises(TransportFailed, match="output n"):
        decode_answer(head + tail, len(head))
