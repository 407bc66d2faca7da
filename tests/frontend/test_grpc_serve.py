"""A real server over gRPC, as known clients meet it: right answers, clear refusals, shared memory, and its end."""

import asyncio
import queue
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import shared_memory

from headrace.wire.datatypes import TO_DTYPE, numpy_dtype
from tests.serving import WAIT_S, Server

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # else clients of a process share one
TENSORS = """
import torch

DTYPES = {dtypes}

class Same(torch.nn.Module):
    def forward(self, **tensors):
        return {{name: tensor.to(getattr(torch, DTYPES[name])) for name, tensor in tensors.items()}}

def build():
    return Same()

def example_inputs():
    return {{datatype: torch.zeros(2, 2, dtype=getattr(torch, dtype)) for datatype, dtype in DTYPES.items()}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--frontends", "2", "--queue-rows", "256", "--system-shared-memory")
    server = Server(tmp_path_factory.mktemp("server"), *options)
    yield server
    assert server.stop() == 0


def connect(server):
    return triton.InferenceServerClient(server.grpc_address, channel_args=OWN_CONNECTION)


def inputs_of(rows, seed=0, ids=None):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, 3)).astype(np.float32)
    ids = generator.integers(14, 70, (rows, 4)) if ids is None else np.array(ids)
    given = [triton.InferInput("values", [rows, 3], "FP32"), triton.InferInput("ids", [rows, 4], "INT64")]
    for each, data in zip(given, (values, ids), strict=True):
        each.set_data_from_numpy(data)
    return given, values, ids


@pytest.mark.parametrize("rows", [1, 4])
def test_a_known_client_gets_the_models_answers(server, rows):
    given, values, ids = inputs_of(rows)
    outputs = [triton.InferRequestedOutput(name) for name in ("sum", "doubled")]
    answer = connect(server).infer("served", given, outputs=outputs, request_id="r1", model_version="1")
    np.testing.assert_array_equal(answer.as_numpy("doubled"), values * 2)
    np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
    assert [each.name for each in answer.get_response().outputs] == ["sum", "doubled"]
    assert answer.get_response().id == "r1"
    assert answer.get_response().model_version == "1"


def test_an_asynchronous_client_gets_many_answers_at_once(server):
    async def ask():
        async with triton_aio.InferenceServerClient(server.grpc_address) as client:

            async def one(seed):
                given, values, _ = inputs_of(1 + seed % 4, seed)
                answer = await client.infer("served", given)
                return np.array_equal(answer.as_numpy("doubled"), values * 2)

            assert all(await asyncio.gather(*(one(seed) for seed in range(60))))

    asyncio.run(ask())


def test_what_the_client_asks_of_the_server_is_answered(server):
    client = connect(server)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("served", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("served", "9")
    assert client.get_server_metadata().name == "headrace"
    assert list(client.get_server_metadata().extensions).count("system_shared_memory") == 1
    metadata = client.get_model_metadata("served")
    assert (metadata.inputs[1].name, metadata.inputs[1].datatype, list(metadata.inputs[1].shape)) == (
        "ids",
        "INT64",
        [-1, 4],
    )
    assert [tensor.name for tensor in metadata.outputs] == ["doubled", "sum"]
    config = client.get_model_config("served").config
    assert config.max_batch_size == 4
    assert [tensor.data_type for tensor in config.input] == [11, 9]  # TYPE_FP32, TYPE_INT64
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert client.get_model_repository_index().models[0].state == "READY"


def test_statistics_count_requests_and_rows(server):
    client = connect(server)
    before = client.get_inference_statistics("served").model_stats[0]
    client.infer("served", inputs_of(3)[0])
    for after in (
        client.get_inference_statistics("served", "1").model_stats[0],
        client.get_inference_statistics().model_stats[0],
    ):
        assert after.inference_count == before.inference_count + 3
        assert after.inference_stats.success.count == before.inference_stats.success.count + 1
        assert after.inference_stats.success.ns > before.inference_stats.success.ns
    assert connect(server).get_inference_statistics("served").model_stats[0].inference_stats.HasField("cache_hit")


@pytest.mark.parametrize(
    ("ask", "status", "words"),
    [
        (lambda client: client.infer("other", inputs_of(1)[0]), "NOT_FOUND", "there is no model other"),
        (lambda client: client.infer("served", inputs_of(1)[0], "9"), "NOT_FOUND", "no version 9"),
        (lambda client: client.get_model_metadata("other"), "NOT_FOUND", "there is no model other"),
        (lambda client: client.infer("served", inputs_of(5)[0]), "INVALID_ARGUMENT", "takes at most 4"),
        (lambda client: client.infer("served", inputs_of(1)[0][:1]), "INVALID_ARGUMENT", "the model takes values, ids"),
        (
            lambda client: client.infer("served", inputs_of(1)[0], sequence_id=5),
            "INVALID_ARGUMENT",
            "keeps no state between requests",
        ),
        (
            lambda client: client.infer("served", inputs_of(1, ids=[[13, 0, 0, 0]])[0]),
            "INTERNAL",
            r"ValueError: thirteen in \(path\), http://a/b",
        ),
    ],
    ids=["unknown model", "unknown version", "metadata", "too many rows", "missing input", "sequence", "model raises"],
)
def test_bad_requests_are_told_what_is_wrong(server, ask, status, words):
    with pytest.raises(triton.InferenceServerException, match=words) as caught:
        ask(connect(server))
    assert caught.value.status() == f"StatusCode.{status}"


def test_a_stream_answers_in_order_and_goes_on_after_an_error(server):
    client = connect(server)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(20):
        ids = [[13, 0, 0, 0]] if number == 5 else [[number + 14, 0, 0, 0]]
        client.async_stream_infer("served", inputs_of(1, ids=ids)[0], request_id=str(number))
    told = [answers.get(timeout=WAIT_S) for _ in range(20)]
    client.stop_stream()
    assert "thirteen" in str(told[5][1])
    for number, (result, error) in enumerate(told):
        if number != 5:
            assert error is None
            assert result.get_response().id == str(number)
            assert result.as_numpy("sum").tolist() == [number + 14]


@pytest.fixture
def memory():
    """Shared memory of the client, of 256 bytes; its name, and its handle."""
    name = f"grpc-test-{socket.gethostname()}"
    handle = shared_memory.create_shared_memory_region("r", name, 256)
    yield name, handle
    shared_memory.destroy_shared_memory_region(handle)


def in_memory(rows):
    """Return inputs and outputs of a request whose values, ids and doubled lie in region r, from 16 on."""
    values, ids = inputs_of(rows)[0]
    values.set_shared_memory("r", 12 * rows, offset=0)
    ids.set_shared_memory("r", 32 * rows, offset=64)
    outputs = [triton.InferRequestedOutput("doubled"), triton.InferRequestedOutput("sum")]
    outputs[0].set_shared_memory("r", 48, offset=192)
    return [values, ids], outputs


def write(handle, rows, seed):
    _, values, ids = inputs_of(rows, seed)
    shared_memory.set_shared_memory_region(handle, [values], offset=16)
    shared_memory.set_shared_memory_region(handle, [ids], offset=80)
    return values, ids


def test_tensors_in_shared_memory_are_read_and_written_there_by_every_frontend(server, memory):
    name, handle = memory
    client = connect(server)
    client.unregister_system_shared_memory()
    client.register_system_shared_memory("r", name, 240, offset=16)
    (region,) = client.get_system_shared_memory_status().regions.values()
    assert (region.name, region.key, region.offset, region.byte_size) == ("r", name, 16, 240)
    for seed in range(12):  # each over a connection of its own, which the kernel gives to either frontend
        values, ids = write(handle, 2, seed)
        given, outputs = in_memory(2)
        answer = connect(server).infer("served", given, outputs=outputs)
        doubled = shared_memory.get_contents_as_numpy(handle, np.float32, [2, 3], offset=208)
        np.testing.assert_array_equal(doubled, values * 2)
        np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
        assert answer.get_response().raw_output_contents[0] == b""
    with pytest.raises(triton.InferenceServerException, match="is registered already"):
        connect(server).register_system_shared_memory("r", name, 8)
    client.unregister_system_shared_memory("r")
    for _ in range(12):
        with pytest.raises(triton.InferenceServerException, match="there is no shared memory region r"):
            connect(server).infer("served", given, outputs=outputs)
        assert not connect(server).get_system_shared_memory_status().regions


def test_inputs_in_shared_memory_and_in_the_request_mix(server, memory):
    name, handle = memory
    client = connect(server)
    client.register_system_shared_memory("r", name, 240, offset=16)
    values, _ = write(handle, 1, 3)
    given, raw_values, ids = inputs_of(1, 9)
    given[0].set_shared_memory("r", 12)
    answer = client.infer("served", given)
    client.unregister_system_shared_memory("r")
    np.testing.assert_array_equal(answer.as_numpy("doubled"), values * 2)
    np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
    assert not np.array_equal(values, raw_values)


def test_a_place_that_is_too_small_for_an_output_is_refused(server, memory):
    name, _ = memory
    client = connect(server)
    client.register_system_shared_memory("r", name, 240, offset=16)
    given, outputs = in_memory(2)
    outputs[0].set_shared_memory("r", 23)
    with pytest.raises(triton.InferenceServerException, match=r"an output has 24 bytes, and its place .* has 23"):
        client.infer("served", given, outputs=outputs)
    client.unregister_system_shared_memory("r")


@pytest.fixture(scope="module")
def small_server(tmp_path_factory):
    options = ("--queue-rows", "4", "--max-body-bytes", "2000", "--system-shared-memory")
    server = Server(tmp_path_factory.mktemp("small"), *options)
    yield server
    assert server.stop() == 0


@pytest.fixture
def mortal_server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait(WAIT_S)


def ask_until_there_is_room(client, given):
    """Ask again while the server says that it is full; return the answer."""
    while True:
        try:
            return client.infer("served", given)
        except triton.InferenceServerException as error:
            if "no 1 rows are free" not in str(error):
                raise


def test_a_call_that_is_cancelled_keeps_its_room_while_it_is_computed_and_no_longer(small_server):
    client, one_row = connect(small_server), inputs_of(1)[0]
    held = inputs_of(4, ids=[[77, 0, 0, 0]] * 4)[0]
    errors = queue.Queue()
    call = client.async_infer("served", held, lambda result, error: errors.put(error))
    writer = small_server.gate.open("w")  # opens only when the model has it: now it is surely held
    call.cancel()
    assert "CANCELLED" in str(errors.get(timeout=WAIT_S))
    with pytest.raises(triton.InferenceServerException, match=r"UNAVAILABLE.*no 1 rows are free"):
        client.infer("served", one_row)
    writer.close()
    ask_until_there_is_room(client, one_row)


def test_a_message_beyond_the_limit_is_refused(small_server):
    client = connect(small_server)
    with pytest.raises(triton.InferenceServerException, match="larger than max") as caught:
        client.infer("served", inputs_of(1)[0], request_id="x" * 2000)
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert client.infer("served", inputs_of(1)[0])


def test_a_frontend_that_is_started_anew_knows_the_regions(small_server, memory):
    name, handle = memory
    connect(small_server).register_system_shared_memory("r", name, 240, offset=16)
    small_server.frontend().kill()
    small_server.wait_for("is started anew")
    while not small_server.is_ready():
        pass
    values, _ = write(handle, 2, 1)
    given, outputs = in_memory(2)
    connect(small_server).infer("served", given, outputs=outputs)
    doubled = shared_memory.get_contents_as_numpy(handle, np.float32, [2, 3], offset=208)
    np.testing.assert_array_equal(doubled, values * 2)


def test_the_end_answers_what_was_taken_and_does_not_wait_for_idle_streams(mortal_server):
    client, other = connect(mortal_server), connect(mortal_server)
    other.start_stream(lambda result, error: None)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.infer, "served", inputs_of(1, ids=[[77, 0, 0, 0]])[0])
        writer = mortal_server.gate.open("w")
        mortal_server.process.send_signal(signal.SIGTERM)
        mortal_server.wait_for("stopping")
        writer.close()
        assert held.result(WAIT_S).as_numpy("sum").tolist() == [77]
    assert mortal_server.process.wait(WAIT_S) == 0
    other.stop_stream(cancel_requests=True)


@pytest.fixture(scope="module")
def tensors_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("tensors"), model=TENSORS.format(dtypes=TO_DTYPE))
    yield server
    server.process.kill()
    server.process.wait(WAIT_S)


LISTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


FLOATS = ("FP16", "BF16", "FP32", "FP64")  # the server's outputs are FP32 for all of them


def all_types(fill):
    """Return a request with an input of each element type, and the outputs that it has; `fill` puts data into it."""
    request = service_pb2.ModelInferRequest(model_name="served")
    generator = np.random.default_rng(0)
    outputs = {}
    for datatype, dtype in TO_DTYPE.items():
        tensor = request.inputs.add(name=datatype, datatype=datatype, shape=[3, 2])
        whole = generator.integers(0, 2 if datatype in ("BOOL", "UINT8") else 100, (3, 2))
        floats = whole.astype(np.float32)
        kind = numpy_dtype(dtype)
        data = (floats.view(np.uint32) >> 16).astype(kind) if datatype == "BF16" else whole.astype(kind)
        outputs[datatype] = floats.tobytes() if datatype in FLOATS else data.tobytes()
        fill(request, tensor, data.tobytes(), kind)
    return request, outputs


def as_raw(request, _, data, __):
    request.raw_input_contents.append(data)


def as_contents(_, tensor, data, kind):
    getattr(tensor.contents, LISTS[tensor.datatype]).extend(np.frombuffer(data, kind).tolist())


def test_every_element_type_travels_raw(tensors_server):
    request, outputs = all_types(as_raw)
    with grpc.insecure_channel(tensors_server.grpc_address) as channel:
        told = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert {each.name: data for each, data in zip(told.outputs, told.raw_output_contents, strict=True)} == outputs
    for each in told.outputs:
        assert each.datatype == ("FP32" if each.name in FLOATS else each.name)


def test_no_element_type_is_refused_in_contents_but_those_of_16_bits(tensors_server):
    def fill(request, tensor, data, kind):
        if tensor.datatype in LISTS:
            as_contents(request, tensor, data, kind)

    request, _ = all_types(fill)
    with grpc.insecure_channel(tensors_server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="input FP16 is FP16, which contents cannot carry"):
            stub.ModelInfer(request)


def test_a_port_in_use_is_not_shared_with_another_server(server):
    port = server.grpc_address.partition(":")[2]
    command = [sys.executable, "-m", "headrace", "serve", "resnet18", "--device", "cpu", "--http-port", "0"]
    done = subprocess.run([*command, "--grpc-port", port], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert re.search(rf"--grpc-port {port} on 127.0.0.1: cannot listen there", done.stderr)
