"""Infer requests over gRPC to bytes and back: every element type, and what is wrong is said."""

import numpy as np
import pytest

from headrace.errors import InvalidRequest
from headrace.tensors import TensorSpec
from headrace.wire.datatypes import TO_DTYPE, numpy_dtype
from headrace.wire.grpc import codec
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.places import RegionPlace

VALUES = TensorSpec(name="values", dtype="float32", features=(2,))
IDS = TensorSpec(name="ids", dtype="int64", features=())
INPUTS = (VALUES, IDS)
OUTPUTS = (
    TensorSpec(name="doubled", dtype="float32", features=(2,)),
    TensorSpec(name="sum", dtype="int64", features=()),
)


def request(*, values=(1.0, 2.0), ids=(3,), **fields):
    message = pb.ModelInferRequest(model_name="m", **fields)
    message.inputs.add(name="ids", datatype="INT64", shape=[len(ids)]).contents.int64_contents[:] = ids
    message.inputs.add(name="values", datatype="FP32", shape=[len(ids), 2]).contents.fp32_contents[:] = values
    return message


def raw_request(*raw, places=()):
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=raw)
    message.inputs.add(name="ids", datatype="INT64", shape=[1])
    message.inputs.add(name="values", datatype="FP32", shape=[1, 2])
    for number, size in places:
        parameters = message.inputs[number].parameters
        parameters["shared_memory_region"].string_param = "region"
        parameters["shared_memory_offset"].int64_param = 16
        parameters["shared_memory_byte_size"].int64_param = size
    return message


def decode(message, inputs=INPUTS, outputs=OUTPUTS):
    return codec.decode(codec.parse(message.SerializeToString()), inputs, outputs)


def test_contents_become_bytes_in_the_models_order():
    decoded = decode(request(id="7"))
    assert decoded.id == "7"
    assert decoded.rows == 1
    assert bytes(decoded.inputs[0]) == np.array([1, 2], np.float32).tobytes()
    assert bytes(decoded.inputs[1]) == np.array([3], np.int64).tobytes()
    assert [wanted.number for wanted in decoded.outputs] == [0, 1]


def test_raw_inputs_come_in_the_requests_order_without_those_in_regions():
    decoded = decode(raw_request(b"i" * 8, b"v" * 8))
    assert [bytes(data) for data in decoded.inputs] == [b"v" * 8, b"i" * 8]
    decoded = decode(raw_request(b"v" * 8, places=[(0, 8)]))
    assert bytes(decoded.inputs[0]) == b"v" * 8
    assert decoded.inputs[1] == RegionPlace("region", 16, 8)


SAMPLES = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "FP32": ("fp32_contents", [1.5, float("inf")]),
    "FP64": ("fp64_contents", [1e300, float("nan")]),
}


def one_input(datatype, **contents):
    message = pb.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    for field, values in contents.items():
        getattr(tensor.contents, field)[:] = values
    return message


@pytest.mark.parametrize("datatype", TO_DTYPE)
def test_every_element_type_travels_in_the_list_that_the_protocol_has_for_it(datatype):
    spec = TensorSpec(name="x", dtype=TO_DTYPE[datatype], features=(2,))
    if datatype in ("FP16", "BF16"):
        with pytest.raises(InvalidRequest, match="which contents cannot carry; send it raw"):
            decode(one_input(datatype, fp32_contents=[1, 2]), (spec,), ())
        return
    field, values = SAMPLES[datatype]
    decoded = decode(one_input(datatype, **{field: values}), (spec,), ())
    assert bytes(decoded.inputs[0]) == np.array(values, numpy_dtype(spec.dtype)).tobytes()


@pytest.mark.parametrize(
    ("datatype", "contents", "words"),
    [
        ("INT8", {"int_contents": [1, 128]}, "values that are no INT8"),
        ("UINT8", {"uint_contents": [1, 256]}, "values that are no UINT8"),
        ("INT32", {"int64_contents": [1, 2]}, "is INT32 and has int64_contents; send int_contents"),
        ("INT32", {"int_contents": [1]}, r"1 values in int_contents; its shape \[1, 2\] needs 2"),
        ("FP32", {}, "0 values in fp32_contents"),
    ],
    ids=["INT8", "UINT8", "other list", "too few", "none"],
)
def test_contents_that_are_not_the_tensors_are_refused(datatype, contents, words):
    spec = TensorSpec(name="x", dtype=TO_DTYPE[datatype], features=(2,))
    with pytest.raises(InvalidRequest, match=words):
        decode(one_input(datatype, **contents), (spec,), ())


def changed(message, change):
    change(message)
    return message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (raw_request(b"i" * 8), "input values has no data: there are 1 raw_input_contents"),
        (raw_request(b"i" * 8, b"v" * 8, b"x"), "3 raw_input_contents for 2 inputs"),
        (raw_request(b"i" * 8, b"v" * 7), r"7 bytes in raw_input_contents; its shape \[1, 2\] needs 8"),
        (raw_request(b"v" * 8, places=[(0, 9)]), "9 bytes in shared_memory_region"),
        (request(raw_input_contents=[b"i" * 8]), "input ids has contents, and the request raw_input_contents"),
        (request(values=[], ids=[]), r"shape \[0, 2\]; the model takes \[rows, 2\], rows at least 1"),
        (changed(request(), lambda m: m.inputs[1].shape.__setitem__(0, 2)), "1 and 2 rows"),
        (changed(request(), lambda m: m.inputs.pop()), "inputs ids were given; the model takes values, ids"),
        (changed(request(), lambda m: setattr(m.inputs[0], "datatype", "FP32")), "the model takes INT64"),
        (changed(request(), lambda m: m.outputs.add(name="z")), "output z was asked for; the model gives doubled, sum"),
        (changed(request(), lambda m: [m.outputs.add(name="sum") for _ in "ab"]), "asked for more than once"),
    ],
    ids=[
        "too few raw",
        "too many raw",
        "raw size",
        "region size",
        "raw and contents",
        "no rows",
        "different rows",
        "missing input",
        "datatype",
        "unknown output",
        "output twice",
    ],
)
def test_what_is_wrong_is_said(message, words):
    with pytest.raises(InvalidRequest, match=words):
        decode(message)


def with_parameters(**parameters):
    message = request()
    for name, (kind, value) in parameters.items():
        setattr(message.parameters[name], kind, value)
    return message


def test_timeout_and_priority_are_read_and_what_is_unknown_is_not():
    decoded = decode(
        with_parameters(
            timeout=("int64_param", 500),
            priority=("uint64_param", 2),
            triton_enable_empty_final_response=("bool_param", True),
            mine=("string_param", "x"),
        )
    )
    assert (decoded.timeout_us, decoded.priority) == (500, 2)
    assert decode(with_parameters(timeout=("uint64_param", 2**63))).timeout_us == codec.LONGEST_TIMEOUT_US


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"timeout": ("int64_param", -1)}, "timeout is -1"),
        ({"priority": ("string_param", "high")}, "priority is 'high'"),
        ({"sequence_id": ("int64_param", 4)}, "sequence_id: the model keeps no state"),
    ],
    ids=["negative", "no number", "sequence"],
)
def test_parameters_that_cannot_be_followed_are_refused(parameters, words):
    with pytest.raises(InvalidRequest, match=words):
        decode(with_parameters(**parameters))


def test_a_response_has_the_outputs_that_were_asked_for_in_their_order_and_those_in_regions_empty():
    message = request(id="9")
    message.outputs.add(name="sum")
    parameters = message.outputs.add(name="doubled").parameters
    parameters["shared_memory_region"].string_param = "out"
    parameters["shared_memory_byte_size"].uint64_param = 64
    decoded = decode(message)
    assert decoded.outputs[1].place == RegionPlace("out", 0, 64)
    response = codec.encode(decoded, "m", "1", [memoryview(b"d" * 8), memoryview(b"s" * 8)], OUTPUTS)
    told = pb.ModelInferResponse.FromString(response.message())
    assert (told.model_name, told.model_version, told.id) == ("m", "1", "9")
    assert [(each.name, each.datatype, list(each.shape)) for each in told.outputs] == [
        ("sum", "INT64", [1]),
        ("doubled", "FP32", [1, 2]),
    ]
    assert list(told.raw_output_contents) == [b"s" * 8, b""]
    assert told.outputs[1].parameters["shared_memory_byte_size"].int64_param == 8
    assert pb.ModelStreamInferResponse.FromString(response.stream_message()).infer_response == told
