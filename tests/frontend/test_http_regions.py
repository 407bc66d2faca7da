"""Shared memory of clients over HTTP, as a known client uses it: right answers, clear refusals, all frontends alike."""

import json
import os
import re
import socket

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import shared_memory

from tests.serving import Server, infer_body

NAME = f"http-test-{socket.gethostname()}-{os.getpid()}"
SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--frontends", "2", "--queue-rows", "256", "--system-shared-memory")
    server = Server(tmp_path_factory.mktemp("server"), *options)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory):
    """A server that was started without --system-shared-memory."""
    server = Server(tmp_path_factory.mktemp("plain"))
    yield server
    assert server.stop() == 0


@pytest.fixture
def memory():
    """Shared memory of the client, of 256 bytes."""
    handle = shared_memory.create_shared_memory_region("r", NAME, 256)
    yield handle
    shared_memory.destroy_shared_memory_region(handle)


@pytest.fixture
def registered(server, memory):
    """Region r: the memory from 16 on, 240 bytes."""
    connect(server).register_system_shared_memory("r", NAME, 240, offset=16)
    yield memory
    connect(server).unregister_system_shared_memory()


def connect(server):
    return triton.InferenceServerClient(server.address)


def inputs_of(rows, seed, *, binary=True):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, 3)).astype(np.float32)
    ids = generator.integers(14, 70, (rows, 4))
    given = [triton.InferInput("values", [rows, 3], "FP32"), triton.InferInput("ids", [rows, 4], "INT64")]
    for each, data in zip(given, (values, ids), strict=True):
        each.set_data_from_numpy(data, binary_data=binary)
    return given, values, ids


def in_memory(rows, *, binary=True):
    """Return inputs and outputs of a request whose values, ids and doubled lie in region r."""
    (values, ids), *_ = inputs_of(rows, 0)
    values.set_shared_memory("r", 12 * rows)
    ids.set_shared_memory("r", 32 * rows, offset=64)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("doubled", "sum")]
    outputs[0].set_shared_memory("r", 48, offset=192)
    return [values, ids], outputs


def write(handle, rows, seed):
    _, values, ids = inputs_of(rows, seed)
    shared_memory.set_shared_memory_region(handle, [values], offset=16)
    shared_memory.set_shared_memory_region(handle, [ids], offset=80)
    return values, ids


def doubled_in(handle, rows):
    return shared_memory.get_contents_as_numpy(handle, np.float32, [rows, 3], offset=208)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_tensors_in_shared_memory_are_read_and_written_there_by_every_frontend(server, registered, binary):
    for seed in range(12):  # each over a connection of its own, which the kernel gives to either frontend
        values, ids = write(registered, 2, seed)
        given, outputs = in_memory(2, binary=binary)
        answer = connect(server).infer("served", given, outputs=outputs)
        np.testing.assert_array_equal(doubled_in(registered, 2), values * 2)
        np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
        assert answer.get_output("doubled") == {"name": "doubled", "datatype": "FP32", "shape": [2, 3]}


def test_where_all_outputs_lie_in_regions_the_answer_is_json_alone(server, registered):
    values, _ = write(registered, 1, 5)
    given, outputs = in_memory(1)
    answer = connect(server).infer("served", given, outputs=outputs[:1])
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["doubled"]
    np.testing.assert_array_equal(doubled_in(registered, 1), values * 2)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_inputs_in_shared_memory_and_in_the_request_mix(server, registered, binary):
    values, _ = write(registered, 1, 3)
    given, raw_values, ids = inputs_of(1, 9, binary=binary)
    given[0].set_shared_memory("r", 12)
    answer = connect(server).infer("served", given)
    np.testing.assert_array_equal(answer.as_numpy("doubled"), values * 2)
    np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
    assert not np.array_equal(values, raw_values)


def test_an_output_in_shared_memory_leaves_the_rest_of_the_region_alone(server, registered):
    given, values, _ = inputs_of(1, 4)
    registered._mpsm_handle.buf[:] = bytes([9]) * 256
    output = triton.InferRequestedOutput("doubled")
    output.set_shared_memory("r", 100, offset=40)
    connect(server).infer("served", given, outputs=[output])
    content = bytes(registered._mpsm_handle.buf)
    assert content == bytes([9]) * 56 + (values * 2).tobytes() + bytes([9]) * 188


def test_status_tells_what_is_registered_on_every_frontend_over_both_protocols(server, registered):
    region = {"name": "r", "key": NAME, "offset": 16, "byte_size": 240}
    for _ in range(12):
        assert connect(server).get_system_shared_memory_status() == [region]
        assert connect(server).get_system_shared_memory_status("r") == [region]
    assert list(triton_grpc.InferenceServerClient(server.grpc_address).get_system_shared_memory_status().regions) == [
        "r"
    ]
    assert "system_shared_memory" in connect(server).get_server_metadata()["extensions"]
    with pytest.raises(triton.InferenceServerException, match="there is no shared memory region other"):
        connect(server).get_system_shared_memory_status("other")


def test_an_unregistered_region_is_unknown_to_every_frontend(server, registered):
    given, outputs = in_memory(1)
    connect(server).unregister_system_shared_memory("other")
    connect(server).infer("served", given, outputs=outputs)
    connect(server).unregister_system_shared_memory("r")
    for _ in range(12):
        with pytest.raises(triton.InferenceServerException, match="there is no shared memory region r"):
            connect(server).infer("served", given, outputs=outputs)
        assert connect(server).get_system_shared_memory_status() == []


def test_a_region_is_named_by_any_text(server, memory):
    client = connect(server)
    client.register_system_shared_memory("a b:ü%", NAME, 256)
    assert [region["name"] for region in client.get_system_shared_memory_status("a b:ü%")] == ["a b:ü%"]
    client.unregister_system_shared_memory("a b:ü%")
    assert client.get_system_shared_memory_status() == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"key": NAME, "offset": 0, "byte_size": 257}, "has no 257 bytes from 0 on"),
        ({"key": NAME, "offset": 250, "byte_size": 10}, "has no 10 bytes from 250 on"),
        ({"key": NAME, "byte_size": 2**64}, "to end before"),
        ({"key": NAME, "byte_size": 0}, "at least 1 byte"),
        ({"key": NAME, "byte_size": -1}, "at least 1 byte"),
        ({"key": NAME, "offset": -1, "byte_size": 1}, "at least 1 byte"),
        ({"key": f"../shm/{NAME}", "byte_size": 1}, "is no name of shared memory"),
        ({"key": "/headrace-1", "byte_size": 1}, "begins as memory of the server does"),
        ({"key": f"{NAME}-other", "byte_size": 1}, "cannot be opened"),
        ({"byte_size": 1}, "no register request: .* `key`"),
        ({"key": NAME}, "missing required field `byte_size`"),
        ({"key": NAME, "byte_size": "1"}, r"Expected `int`, got `str` - at `\$.byte_size`"),
        ({"key": NAME, "byte_size": True}, "Expected `int`, got `bool`"),
        ({"key": 5, "byte_size": 1}, "Expected `str`, got `int`"),
        (b"", "no register request"),
        (b"[" * 10_000, "no register request"),
    ],
    ids=lambda value: str(value).replace(NAME, "NAME")[:60],  # the same in every worker
)
def test_what_can_be_no_region_is_refused(server, memory, body, words):
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    status, _, answer = server.call(f"{SYSTEM}/region/r/register", data)
    assert status == 400
    assert re.search(words, json.loads(answer)["error"])
    assert connect(server).get_system_shared_memory_status() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda given, outputs: outputs[0].set_shared_memory("r", 23),
            "an output has 24 bytes, and its place .* has 23",
        ),
        (lambda given, outputs: outputs[0].set_shared_memory("r", 48, offset=200), "48 from 200 on are not within it"),
        (lambda given, outputs: outputs[0].set_shared_memory("other", 48), "there is no shared memory region other"),
        (
            lambda given, outputs: given[0].set_shared_memory("r", 25),
            "input values has 25 bytes in shared_memory_region",
        ),
        (lambda given, outputs: given[1].set_shared_memory("r", 64, offset=200), "64 from 200 on are not within it"),
        (lambda given, outputs: given[1].set_shared_memory("r", 64, offset=-8), "must be numbers of bytes"),
        (lambda given, outputs: given[1].set_shared_memory("r", 64, offset=2**64), "are not within it"),
        (lambda given, outputs: given[1].set_shared_memory("other", 64), "there is no shared memory region other"),
    ],
    ids=[
        "output too large",
        "output beyond the end",
        "output in no region",
        "input of another size",
        "input beyond the end",
        "before the begin",
        "overflow",
        "input in no region",
    ],
)
def test_places_that_are_none_are_refused_and_the_connection_goes_on(server, registered, change, words):
    client = connect(server)
    values, _ = write(registered, 2, 1)
    given, outputs = in_memory(2)
    change(given, outputs)
    with pytest.raises(triton.InferenceServerException, match=words) as caught:
        client.infer("served", given, outputs=outputs)
    assert caught.value.status() == "400"
    given, outputs = in_memory(2)
    client.infer("served", given, outputs=outputs)
    np.testing.assert_array_equal(doubled_in(registered, 2), values * 2)


def test_memory_that_was_shortened_fails_the_request_and_nothing_else(server, registered):
    given, outputs = in_memory(2)
    os.truncate(f"/dev/shm/{NAME}", 20)  # noqa: S108
    with pytest.raises(triton.InferenceServerException, match="region r ended before its tensor"):
        connect(server).infer("served", given, outputs=outputs)
    os.truncate(f"/dev/shm/{NAME}", 256)  # noqa: S108
    assert server.call("/v2/models/served/infer", infer_body([14, 0, 0, 0]))[0] == 200


def test_a_refused_place_is_counted_as_an_invalid_request_and_holds_no_rows(server, registered):
    client = connect(server)
    before = failures(server)
    given, outputs = in_memory(2)
    outputs[0].set_shared_memory("other", 48)
    for _ in range(300):  # more than there are rows
        with pytest.raises(triton.InferenceServerException, match="there is no shared memory region other"):
            client.infer("served", given, outputs=outputs)
    assert failures(server) == before + 300


def failures(server):
    statistics = json.loads(server.call("/v2/models/served/stats")[2])
    return statistics["model_stats"][0]["inference_stats"]["fail"]["count"]


def test_cuda_memory_is_not_offered_and_unregistering_it_is_no_error(server):
    client = connect(server)
    assert client.get_cuda_shared_memory_status() == []
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("r")
    with pytest.raises(triton.InferenceServerException, match="takes no CUDA memory of clients; send") as caught:
        client.register_cuda_shared_memory("r", b"x" * 64, 0, 8)
    assert caught.value.status() == "400"
    assert "cuda_shared_memory" not in client.get_server_metadata()["extensions"]


def test_where_regions_are_switched_off_the_server_says_how_to_have_them(plain_server, memory):
    client = connect(plain_server)
    assert "system_shared_memory" not in client.get_server_metadata()["extensions"]
    client.unregister_system_shared_memory()
    client.unregister_system_shared_memory("r")
    assert client.get_system_shared_memory_status() == []
    with pytest.raises(triton.InferenceServerException, match="--system-shared-memory") as caught:
        client.register_system_shared_memory("r", NAME, 256)
    assert caught.value.status() == "400"
    given, outputs = in_memory(1)
    with pytest.raises(triton.InferenceServerException, match="--system-shared-memory"):
        client.infer("served", given)
    with pytest.raises(triton.InferenceServerException, match="--system-shared-memory"):
        client.infer("served", inputs_of(1, 0)[0], outputs=outputs)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", SYSTEM, 404),
        ("GET", f"{SYSTEM}/region/r", 404),
        ("POST", f"{SYSTEM}/register", 404),
        ("GET", f"{SYSTEM}/region/r/register", 405),
        ("POST", f"{SYSTEM}/region/r/status", 405),
        ("GET", f"{CUDA}/unregister", 405),
        ("HEAD", f"{CUDA}/region/r/status", 200),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status):
    assert server.call(path, method=method)[0] == status
