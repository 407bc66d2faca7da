"""Infer messages taken apart and put together: always as the protobuf library would have it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidRequest
from headrace.wire.grpc import frame
from headrace.wire.grpc import inference_pb2 as pb

BLOBS = st.lists(st.binary(max_size=300), max_size=4)


@given(st.text(max_size=200), BLOBS, st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_a_request_is_split_into_its_raw_inputs_and_the_rest(name, raw, shape):
    message = pb.ModelInferRequest(model_name=name, id="x", raw_input_contents=raw)
    message.inputs.add(name="i", datatype="FP32", shape=shape)
    parts = frame.split(message.SerializeToString())
    assert [bytes(data) for data in parts.raw] == raw
    message.ClearField("raw_input_contents")
    assert pb.ModelInferRequest.FromString(parts.head) == message


def test_raw_inputs_may_come_before_and_between_other_fields():
    first = pb.ModelInferRequest(raw_input_contents=[b"one"], id="x").SerializeToString()
    second = pb.ModelInferRequest(raw_input_contents=[b"two"], model_name="m").SerializeToString()
    parts = frame.split(first + second)
    assert [bytes(data) for data in parts.raw] == [b"one", b"two"]
    assert pb.ModelInferRequest.FromString(parts.head) == pb.ModelInferRequest(id="x", model_name="m")


def test_raw_inputs_are_not_copied():
    message = pb.ModelInferRequest(raw_input_contents=[b"data"]).SerializeToString()
    assert frame.split(message).raw[0].obj is message


def test_fields_of_newer_protocols_stay():
    unknown = bytes([9 << 3 | 0, 0x96, 0x01, 10 << 3 | 1, *range(8), 11 << 3 | 5, *range(4)])
    assert frame.split(unknown).head == unknown


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\x0a\x05abc", "ends within a field"),
        (b"\x0a", "ends within a field"),
        (b"\x3a\xff\xff\xff\xff\x0f", "ends within a field"),
        (b"\x08" + b"\x80" * 11, "a number has more than 10 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x3a\x00" * 5000, "more than 4096 fields"),
    ],
    ids=["short value", "no length", "length beyond the end", "endless number", "group", "many fields"],
)
def test_what_is_no_message_is_refused(message, words):
    with pytest.raises(InvalidRequest, match=words):
        frame.split(message)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_refused(message):
    try:
        parts = frame.split(message)
    except InvalidRequest:
        return
    assert sum(map(len, parts.raw)) + len(parts.head) <= len(message)


@given(BLOBS)
def test_a_response_is_joined_with_its_raw_outputs(raw):
    head = pb.ModelInferResponse(model_name="m", id="x")
    whole = pb.ModelInferResponse(model_name="m", id="x", raw_output_contents=raw)
    assert pb.ModelInferResponse.FromString(frame.join(head.SerializeToString(), raw)) == whole
    streamed = frame.join(head.SerializeToString(), [memoryview(data) for data in raw], stream=True)
    assert pb.ModelStreamInferResponse.FromString(streamed) == pb.ModelStreamInferResponse(infer_response=whole)
