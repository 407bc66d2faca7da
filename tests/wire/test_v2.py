"""The v2 codec: what is encoded is decoded again, in every form; what is wrong is named."""

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
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
    decoded = v2.decode(head + tail, len(head), SPECS, SPECS)
    assert (decoded.id, decoded.rows) == ("a", rows)
    for spec, data in zip(SPECS, decoded.inputs, strict=True):
        assert bytes(data) == values_of(spec, rows, seed).tobytes()


@given(rows=st.integers(1, 4), seed=st.integers(0, 99), binary=st.booleans())
def test_responses_hold_the_outputs_in_the_form_asked_for(rows, seed, binary):
    request = v2.InferRequest("b", rows, (), tuple(v2.WantedOutput(spec.name, binary) for spec in reversed(SPECS)))
    raw = {spec.name: memoryview(values_of(spec, rows, seed).tobytes()) for spec in SPECS}
    encoded = v2.encode(request, "m", "3", raw, SPECS)
    head = json.loads(encoded.body[: encoded.header_bytes])
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "3", "b")
    at = encoded.header_bytes
    for spec, output in zip(reversed(SPECS), head["outputs"], strict=True):
        values = values_of(spec, rows, seed)
        assert (output["name"], output["shape"], output["datatype"]) == (spec.name, [rows, 2, 3], spec.name.upper())
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            assert not binary
            assert output["data"] == values.reshape(-1).tolist()
        else:
            assert encoded.body[at : at + size] == values.tobytes()
            at += size
    assert at == len(encoded.body)


def test_a_body_may_be_the_only_inputs_bytes():
    values = np.arange(6, dtype=np.float32)
    decoded = v2.decode(values.tobytes(), 0, IMAGE, IMAGE)
    assert decoded.rows == 3
    assert bytes(decoded.inputs[0]) == values.tobytes()
    assert decoded.outputs == (v2.WantedOutput("x", binary=True),)
    with pytest.raises(InvalidRequest, match="a raw body of 7 bytes"):
        v2.decode(b"1234567", 0, IMAGE, IMAGE)


def request(**changes):
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | changes
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "no v2 infer request"),
        ({"inputs": 3}, "Expected `array`, got `int`"),
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "inputs none were given; the model takes x"),
        (request(name="y"), "inputs y were given; the model takes x"),
        (request(datatype="FP64"), "datatype FP64; the model takes FP32"),
        (request(shape=[1, 3]), r"shape \[1, 3\]; the model takes \[rows, 2\]"),
        (request(shape=[0, 2], data=[]), "rows at least 1"),
        (request(shape=[-1, 2]), "rows at least 1"),
        (request(data=[1]), "has 1 values; shape"),
        (request(data=[[1, 2], [3]]), "no regular array"),
        (request(data=["a", "b"]), "values that are no FP32"),
        (request(data=None), "neither data nor binary_data_size"),
        (request(parameters={"binary_data_size": 8}), "both data and binary_data_size"),
        (request(data=None, parameters={"binary_data_size": 8}), "0 are left in the body"),
        (request(data=None, parameters={"binary_data_size": "8"}), "binary_data_size 8; its shape needs 8"),
        (request(parameters={"shared_memory_region": "r"}), "this server offers none"),
        (request() | {"outputs": [{"name": "z"}]}, "output z was asked for; the model gives x"),
        ("[" * 100_000, "no v2 infer request|nested too deeply"),
    ],
)
def test_what_is_wrong_is_refused_and_named(body, message):
    data = body.encode() if isinstance(body, str) else msgspec.json.encode(body)
    with pytest.raises(InvalidRequest, match=message):
        v2.decode(data, None, IMAGE, IMAGE)


@pytest.mark.parametrize(
    ("dtype", "data"),
    [("int64", [1.5, 2.0]), ("uint8", [300, 1]), ("uint8", [-1, 1]), ("bool", [1, 0]), ("int32", [2**40, 1])],
)
def test_numbers_that_the_datatype_cannot_hold_are_refused(dtype, data):
    spec = (TensorSpec(name="x", dtype=dtype, features=(2,)),)
    datatype = next(name for name, each in TO_DTYPE.items() if each == dtype)
    with pytest.raises(InvalidRequest, match=f"values that are no {datatype}"):
        v2.decode(msgspec.json.encode(request(datatype=datatype, data=data)), None, spec, spec)


@given(body=st.binary(max_size=200), header=st.none() | st.integers(-3, 300))
def test_no_bytes_at_all_raise_anything_else(body, header):
    try:
        v2.decode(body, header, IMAGE, IMAGE)
    except InvalidRequest:
        return


def test_bytes_that_belong_to_no_input_are_refused():
    head = msgspec.json.encode(request(data=None, parameters={"binary_data_size": 8}))
    with pytest.raises(InvalidRequest, match="3 bytes of the body belong to no input"):
        v2.decode(head + bytes(11), len(head), IMAGE, IMAGE)
