"""The v2 protocol on Ray, as clients meet it: HTTP with JSON and binary tensors, and gRPC."""

import json
import struct

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.ray_serve.cluster import MAX_BODY_BYTES

ROW = {"name": "values", "shape": [1, 3], "datatype": "FP32"}
IDS = {"name": "ids", "shape": [1, 4], "datatype": "INT64"}
URL = "/v2/models/served/infer"


def inputs(module, rows=1, number=0):
    values = module.InferInput("values", [rows, 3], "FP32")
    values.set_data_from_numpy(np.tile(np.float32([1, 2, 3]), (rows, 1)))
    ids = module.InferInput("ids", [rows, 4], "INT64")
    ids.set_data_from_numpy(np.full((rows, 4), number))
    return [values, ids]


def scaled(served):
    return [served.factor, 2 * served.factor, 3 * served.factor]


@pytest.fixture(params=["http", "grpc"])
def client(request, served):
    """A real client of each protocol, with its module."""
    module = triton_http if request.param == "http" else triton_grpc
    port = served.http_port if request.param == "http" else served.grpc_port
    with module.InferenceServerClient(f"127.0.0.1:{port}") as made:
        yield made, module


def test_a_json_request_is_answered_in_json(served):
    response = served.infer()
    outputs = {each["name"]: each for each in response.json()["outputs"]}
    assert response.status == 200
    assert outputs["scaled"]["data"] == scaled(served)
    assert (outputs["scaled"]["shape"], outputs["batch"]["shape"]) == ([1, 3], [1])


def test_a_binary_request_is_answered_in_binary_where_it_is_asked_for(served):
    head = json.dumps(
        {
            "id": "seven",
            "inputs": [
                ROW | {"parameters": {"binary_data_size": 12}},
                IDS | {"data": [0, 0, 0, 0]},
            ],
            "outputs": [{"name": "scaled", "parameters": {"binary_data": True}}],
        }
    ).encode()
    body = head + struct.pack("<3f", 1, 2, 3)
    response = served.call(URL, body, {"Inference-Header-Content-Length": str(len(head))})
    length = int(response.headers["Inference-Header-Content-Length"])
    told = json.loads(response.data[:length])
    assert told["id"] == "seven"
    assert told["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert list(struct.unpack("<3f", response.data[length:])) == scaled(served)


def test_real_clients_are_answered(client, served):
    made, module = client
    assert made.is_server_live()
    assert made.is_server_ready()
    assert made.is_model_ready("served")
    answer = made.infer("served", inputs(module, rows=3), request_id="nine")
    np.testing.assert_array_equal(answer.as_numpy("scaled"), np.tile(scaled(served), (3, 1)))


def test_more_rows_than_a_batch_has_are_split_and_come_back_as_one(client, served):
    made, module = client
    answer = made.infer("served", inputs(module, rows=11))
    np.testing.assert_array_equal(answer.as_numpy("scaled"), np.tile(scaled(served), (11, 1)))


def test_metadata_and_configuration_are_the_models(client):
    made, module = client
    options = {} if module is triton_http else {"as_json": True}
    metadata = made.get_model_metadata("served", **options)
    assert [each["name"] for each in metadata["inputs"]] == ["values", "ids"]
    assert [each["name"] for each in metadata["outputs"]] == ["scaled", "batch", "pid"]
    assert made.get_server_metadata(**options)["extensions"] == ["binary_tensor_data", "model_configuration"]
    config = made.get_model_config("served", **options)
    assert (config if module is triton_http else config["config"])["max_batch_size"] == 4


@pytest.mark.parametrize(
    ("asked", "words", "codes"),
    [
        (lambda module: ("other", inputs(module)), "there is no model other", ("404", "StatusCode.NOT_FOUND")),
        (
            lambda module: ("served", inputs(module)[:1]),
            "the model takes values, ids",
            ("400", "StatusCode.INVALID_ARGUMENT"),
        ),
        (
            lambda module: ("served", inputs(module, number=13)),
            "ValueError: thirteen in (path)",
            ("500", "StatusCode.INTERNAL"),
        ),
    ],
    ids=["unknown model", "an input is missing", "the model raises"],
)
def test_what_is_wrong_with_a_request_is_told_with_its_code(client, asked, words, codes):
    made, module = client
    with pytest.raises(InferenceServerException) as caught:
        made.infer(*asked(module))
    assert words in caught.value.message()
    assert caught.value.status() in codes


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "words"),
    [
        ("/v2/models/served/infer", b"{", "POST", 400, "no v2 infer request"),
        ("/v2/models/served/infer", None, "GET", 405, "Method Not Allowed; send POST"),
        ("/v2/nothing", None, "GET", 404, "Not Found"),
        ("/v2/models/served/versions/2/ready", None, "GET", 404, "no version 2"),
        ("/v2/models/served/stats", None, "GET", 404, "Not Found"),
    ],
    ids=["no JSON", "no POST", "no such path", "no such version", "statistics"],
)
def test_errors_have_the_protocols_form(served, path, body, method, status, words):
    response = served.call(path, body, method=method)
    assert response.status == status
    assert words in response.json()["error"]


def test_a_body_beyond_the_limit_is_refused(served):
    response = served.call(URL, bytes(MAX_BODY_BYTES + 1))
    assert response.status == 413
    assert str(MAX_BODY_BYTES) in response.json()["error"]


def test_requests_that_wait_are_batched_in_the_engine(served):
    with served.load(threads=24) as answers:
        answers.wait_until(lambda: answers.largest_batch > 1)
    assert set(answers.factors) == {served.factor}
    assert not answers.errors + answers.silent
