"""The v2 codec: what is encoded is decoded again, in every form; what is wrong is named."""

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire import v2
from headrace.wire.datatypes import BINARY_ONLY, TO_DTYPE, numpy_dtype

SPECS = tuple(TensorSpec(name=datatype.lower(), dtype=dtype, features=(2, 3)) for datatype, dtype in TO_DTYPE.items())
IMAGE = (TensorSpec(name="x", dtype="float32", features=(2,)),)


def values_of(spec, rows, seed):
    size = rows * math.prod(spec.features)
    return (
        np.random.default_rng(seed).integers(0, 2, size).astype(numpy_dtype(spec.dtype)).reshape(rows, *spec.features)
    )


@given(rows=st.integers(1, 4), seed=st.integers(0, 99), binary=st.lists(st.booleans(), min_size=10, max_size=10))
@settings(deadline=None)
def test_every_datatype_crosses_as_json_and_as_bytes_and_both_mixed(rows, seed, binary):
    tensors, tail = [], b""
    for spec, as_bytes in zip(SPECS, binary, strict=True):
        datatype = spec.name.upper()
        values = values_of(spec, rows, seed)
        tensor = {"name": spec.name, "shape": [rows, 2, 3], "datatype": datatype}
        if as_bytes or datatype in BINARY_ONLY:
            tensor["parameters"] = {"binary_data_size": values.nbytes}
            tail += values.tobytes()
        else:
            tensor["data"] = values.tolist() if seed % 2 else values.reshape(-1).tolist()
        tensors.append(tensor)
    head = json.dumps({"id": "a", "inputs": tensors}).encode()
    decoded = v2.decode(head, len(tail), SPECS, SPECS)
    assert (decoded.id, decoded.rows) == ("a", rows)
    assert sorted([*decoded.inline, *decoded.binary]) == list(range(len(SPECS)))
    data = decoded.gather(memoryview(tail))
    for number, spec in enumerate(SPECS):
        assert bytes(data[number]) == values_of(spec, rows, seed).tobytes()


@given(rows=st.integers(1, 4), seed=st.integers(0, 99), binary=st.booleans())
@settings(deadline=None)
def test_responses_hold_the_outputs_in_the_form_asked_for(rows, seed, binary):
    request = v2.InferRequest("b", rows, {}, (), tuple(v2.WantedOutput(spec.name, binary) for spec in reversed(SPECS)))
    raw = {spec.name: memoryview(values_of(spec, rows, seed).tobytes()) for spec in SPECS}
    encoded = v2.encode(request, "m", "3", raw, SPECS)
    head, tensors = json.loads(encoded.json), list(encoded.tensors)
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "3", "b")
    for spec, output in zip(reversed(SPECS), head["outputs"], strict=True):
        values = values_of(spec, rows, seed)
        assert (output["name"], output["shape"], output["datatype"]) == (spec.name, [rows, 2, 3], spec.name.upper())
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            assert not binary
            assert output["data"] == values.reshape(-1).tolist()
        else:
            assert size == values.nbytes
            assert bytes(tensors.pop(0)) == values.tobytes()
    assert not tensors


def test_a_body_may_be_the_only_inputs_bytes():
    values = np.arange(6, dtype=np.float32)
    decoded = v2.decode_raw(values.nbytes, IMAGE, IMAGE)
    assert decoded.rows == 3
    assert bytes(decoded.gather(memoryview(values.tobytes()))[0]) == values.tobytes()
    assert decoded.outputs == (v2.WantedOutput("x", binary=True),)
    with pytest.raises(InvalidRequest, match="a raw body of 7 bytes"):
        v2.decode_raw(7, IMAGE, IMAGE)
    with pytest.raises(InvalidRequest, match="can fill one input; the model has 10"):
        v2.decode_raw(8, SPECS, SPECS)


def request(**changes):
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | changes
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


def region(byte_size, region="r", **parameters):
    """Return a request whose input lies in shared memory."""
    place = {"shared_memory_region": region, "shared_memory_byte_size": byte_size}
    return request(data=None, parameters=place | parameters)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "no v2 infer request"),
        ({"inputs": 3}, "Expected `array`, got `int`"),
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "inputs none were given; the model takes x"),
        (request(name="y"), "inputs y were given; the model takes x"),
        (request(datatype="BYTES"), "input x has datatype BYTES; the model takes FP32"),
        (request(datatype="FP64"), "datatype FP64; the model takes FP32"),
        (request(shape=[1, 3]), r"shape \[1, 3\]; the model takes \[rows, 2\]"),
        (request(shape=[0, 2], data=[]), "rows at least 1"),
        (request(shape=[-1, 2]), "rows at least 1"),
        (request(data=[1]), "has 1 values; shape"),
        (request(data=[[1, 2], [3]]), "no regular array"),
        (request(data=["a", "b"]), r"input x: .*got `str` - at `\$\[0\]`"),
        (request(data=[10**40, 1]), "values that are no FP32"),
        (request(shape=[2**31, 2]), "more than 2147483647 rows; split the request"),
        (request(data=None), "has no data; send one of data, binary_data_size and shared_memory_region"),
        (request(parameters={"binary_data_size": 8}), "has binary_data_size and data; send one of"),
        (request(data=None, parameters={"binary_data_size": 8}), "0 are left in the body"),
        (request(data=None, parameters={"binary_data_size": "8"}), "binary_data_size '8'; its shape needs 8"),
        (request(parameters={"shared_memory_region": "r"}), "has shared_memory_region and data; send one of"),
        (region(byte_size=7), r"has 7 bytes in shared_memory_region; its shape \[1, 2\] needs 8"),
        (region(byte_size="8"), "shared_memory_byte_size is '8'; both must be numbers of bytes"),
        (region(byte_size=8, region=5), "shared_memory_region must be the name of a region"),
        (region(byte_size=8, binary_data_size=8), "has binary_data_size and shared_memory_region; send one of"),
        (request() | {"outputs": [{"name": "x"}] * 2}, "output x was asked for more than once"),
        (
            request() | {"outputs": [{"name": "x", "parameters": {"shared_memory_region": "r"}}]},
            "output x: shared_memory_offset is 0 and shared_memory_byte_size is None",
        ),
        (
            request() | {"outputs": [{"name": "x", "parameters": {"classification": 2}}]},
            "output x: classification is not offered",
        ),
        (request() | {"outputs": [{"name": "z"}]}, "output z was asked for; the model gives x"),
        ("[" * 100_000, "no v2 infer request|nested too deeply"),
    ],
)
def test_what_is_wrong_is_refused_and_named(body, message):
    data = body.encode() if isinstance(body, str) else msgspec.json.encode(body)
    with pytest.raises(InvalidRequest, match=message):
        v2.decode(data, 0, IMAGE, IMAGE)


HUGE = b"9" * 4300  # digits: Python reads so many, and writes no number of more


@pytest.mark.parametrize(
    "where",
    [
        b'"parameters": {"binary_data_size": 8}',
        b'"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}',
        b'"data": [1, 2]',
    ],
    ids=["binary", "region", "JSON"],
)
def test_a_number_of_rows_that_python_could_not_write_is_refused(where):
    data = b'{"inputs": [{"name": "x", "shape": [%b, 2], "datatype": "FP32", %b}]}' % (HUGE, where)
    with pytest.raises(InvalidRequest, match="more than 2147483647 rows"):
        v2.decode(data, 8, IMAGE, IMAGE)


def test_a_long_string_among_numbers_costs_no_memory_for_each_of_them():
    data = request(data=["x" * 100_000, *[1] * 100_000])  # in an array of strings each takes the longest one's 400 KB
    with pytest.raises(InvalidRequest, match="got `str`"):
        v2.decode(msgspec.json.encode(data), 0, IMAGE, IMAGE)


@pytest.mark.parametrize(
    ("dtype", "data"),
    [("int64", [1.5, 2.0]), ("uint8", [300, 1]), ("uint8", [-1, 1]), ("bool", [1, 0]), ("int32", [2**40, 1])],
)
def test_numbers_that_the_datatype_cannot_hold_are_refused(dtype, data):
    spec = (TensorSpec(name="x", dtype=dtype, features=(2,)),)
    datatype = next(name for name, each in TO_DTYPE.items() if each == dtype)
    with pytest.raises(InvalidRequest, match=f"values that are no {datatype}"):
        v2.decode(msgspec.json.encode(request(datatype=datatype, data=data)), 0, spec, spec)


@given(json=st.binary(max_size=200), tail_bytes=st.integers(0, 300))
def test_no_bytes_at_all_raise_anything_else(json, tail_bytes):
    try:
        v2.decode(json, tail_bytes, IMAGE, IMAGE)
    except InvalidRequest:
        return


def test_text_that_is_no_utf_8_is_refused():
    with pytest.raises(InvalidRequest, match="no v2 infer request: 'utf-8' codec"):
        v2.decode(msgspec.json.encode(request()).replace(b"FP32", b"FP\x8032"), 0, IMAGE, IMAGE)


def test_bytes_that_belong_to_no_input_are_refused():
    head = msgspec.json.encode(request(data=None, parameters={"binary_data_size": 8}))
    with pytest.raises(InvalidRequest, match="3 bytes of the body belong to no input"):
        v2.decode(head, 11, IMAGE, IMAGE)


def test_the_headers_length_may_not_exceed_the_bodys():
    assert v2.json_bytes(None, 7) == 7
    assert v2.json_bytes(7, 7) == 7
    with pytest.raises(InvalidRequest, match="is 8; it must be 0 to the body's 7 bytes"):
        v2.json_bytes(8, 7)


def with_parameters(**parameters):
    return msgspec.json.encode(request() | {"parameters": parameters})


def test_timeout_and_priority_are_read_and_unknown_parameters_are_not():
    decoded = v2.decode(with_parameters(timeout=5, priority=2, more={"a": 1}, sequence_id=0), 0, IMAGE, IMAGE)
    assert (decoded.timeout_us, decoded.priority) == (5, 2)
    decoded = v2.decode(with_parameters(), 0, IMAGE, IMAGE)
    assert (decoded.timeout_us, decoded.priority) == (0, 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"timeout": -1}, "timeout is -1; it must be a whole number"),
        ({"timeout": 1.5}, "timeout is 1.5"),
        ({"timeout": True}, "timeout is True"),
        ({"timeout": 2**60}, "timeout is 1152921504606846976"),
        ({"priority": "9" * 1000}, "priority is '9+\\.\\.\\.;"),
        ({"sequence_id": 3, "sequence_start": True}, "has sequence_id, sequence_start; stateful models"),
    ],
)
def test_parameters_that_cannot_be_kept_are_refused(parameters, message):
    with pytest.raises(InvalidRequest, match=message):
        v2.decode(with_parameters(**parameters), 0, IMAGE, IMAGE)
