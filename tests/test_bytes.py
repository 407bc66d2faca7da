"""Files in, text out: a real server with steps of its own on the host, as known clients and ours meet it."""

import asyncio
import base64
import io
import json
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

from headrace import AsyncClient, Client
from headrace.errors import InvalidRequest, RunFailed
from tests.frontend.test_openapi import CHECKS, schema
from tests.serving import WAIT_S, Server

MOST = 20_000
SIDE = 64
PATH = "/v2/models/served/infer"
MODEL = f"""
import os
import torch
from headrace.model.described import Bytes, Described
from headrace.model.pictures import decode_jpeg

class Mean(torch.nn.Module):
    def forward(self, pixels, gain):
        return {{"mean": pixels.float().mean((1, 2)) * gain}}

def preprocess(image, gain):
    if image == b"hold":  # until somebody opens the other end and closes it
        with open(os.environ["GATE"]) as gate:
            gate.read()
        image = b"grey 0"
    if image == b"bug":
        raise KeyError("bug in /srv/models/x.py")
    if image.startswith(b"grey"):
        return {{"pixels": torch.full((16, 16, 3), int(image[4:]), dtype=torch.uint8), "gain": gain}}
    return {{"pixels": decode_jpeg(image, 16), "gain": gain}}

def postprocess(mean):
    red, green, blue = (round(value) for value in mean.tolist())
    if red == 66:
        raise ValueError("sixty-six")
    return {{"text": [f"red {{red}}", f"grün {{green}}"], "raw": bytes([255, blue % 256]), "mean": mean}}

def build():
    return Described(
        Mean(),
        inputs={{"image": Bytes(max_bytes={MOST})}},
        preprocess=preprocess,
        outputs={{"text": Bytes(max_bytes=16, shape=(2,)), "raw": Bytes(max_bytes=2)}},
        postprocess=postprocess,
        example={{"image": b"grey 1", "gain": torch.ones(1)}},
    )
"""
THREADS = 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--system-shared-memory", "--queue-rows", "64", "--preprocess-threads", str(THREADS))
    server = Server(tmp_path_factory.mktemp("server"), *options, model=MODEL)
    yield server
    assert server.stop() == 0
    assert not psutil.pid_exists(server.process.pid)


def jpeg(shade, side=SIDE):
    file = io.BytesIO()
    Image.new("RGB", (side + 8, side), (shade,) * 3).save(file, "JPEG")
    return file.getvalue()


def text_of(shade):
    return [b"red %d" % shade, "grün %d".encode() % shade]


def objects(*elements, shape=None):
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape or (-1, 1))


def inputs_of(triton, images, **options):
    image = triton.InferInput("image", list(images.shape), "BYTES")
    image.set_data_from_numpy(images, **options)
    gain = triton.InferInput("gain", [len(images), 1], "FP32")
    gain.set_data_from_numpy(np.ones((len(images), 1), np.float32), **options)
    return [image, gain]


def connect(triton, server):
    address = server.grpc_address if triton is triton_grpc else server.address
    return triton.InferenceServerClient(address)


def body_of(*images, shape=None, **parameters):
    rows = len(images) if shape is None else shape[0]
    return {
        "inputs": [
            {"name": "image", "shape": shape or [rows], "datatype": "BYTES", "data": images, "parameters": parameters},
            {"name": "gain", "shape": [rows, 1], "datatype": "FP32", "data": [1.0] * rows},
        ]
    }


def ask(server, *images, **options):
    """Return status and answer of a request in JSON."""
    status, _, body = server.call(PATH, body_of(*images, **options))
    return status, json.loads(body)


def outputs_of(answer):
    return {output["name"]: output["data"] for output in answer["outputs"]}


def require_right(answer, *shades):
    """Look at a triton client's answer."""
    assert answer.as_numpy("text").tolist() == [text_of(shade) for shade in shades]
    assert answer.as_numpy("raw").tolist() == [[bytes([255, shade])] for shade in shades]
    np.testing.assert_allclose(answer.as_numpy("mean"), [[shade] * 3 for shade in shades], atol=0.5)


PROTOCOLS = pytest.mark.parametrize("triton", [triton_http, triton_grpc], ids=["http", "grpc"])


@PROTOCOLS
@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_a_known_client_sends_files_and_gets_text(server, triton, shape):
    images = objects(jpeg(10), jpeg(20, 99), jpeg(30), shape=shape)
    require_right(connect(triton, server).infer("served", inputs_of(triton, images)), 10, 20, 30)


def test_a_known_client_sends_and_gets_text_as_json(server):
    images = objects("grey 40", "grey 50")
    given = inputs_of(triton_http, images, binary_data=False)
    wanted = [triton_http.InferRequestedOutput(name, binary_data=False) for name in ("text", "mean")]
    answer = connect(triton_http, server).infer("served", given, outputs=wanted)
    assert answer.as_numpy("text").tolist() == [[text.decode() for text in text_of(shade)] for shade in (40, 50)]
    assert answer.as_numpy("mean").tolist() == [[40.0] * 3, [50.0] * 3]


def test_files_may_be_base64_in_json_and_what_is_no_text_is_answered_so(server):
    status, answer = ask(server, base64.b64encode(jpeg(70)).decode(), content_type="base64")
    assert status == 200
    text, raw, _ = answer["outputs"]
    assert (text["datatype"], text["shape"], text["data"]) == ("BYTES", [1, 2], ["red 70", "grün 70"])
    assert (raw["data"], raw["parameters"]) == (["/0Y="], {"content_type": "base64"})


def test_an_answer_is_as_openapi_describes_it(server):
    operation = schema["/v2/models/{name}/infer"]["POST"]
    image = base64.b64encode(jpeg(70)).decode()
    body = body_of(image, content_type="base64") | {"outputs": [{"name": "text"}, {"name": "raw"}]}
    body["inputs"][0]["data"] = [image]
    case = operation.Case(path_parameters={"name": "served"}, body=body, media_type="application/json")
    case.validate_response(case.call(base_url=f"http://{server.address}"), checks=CHECKS)
    metadata = schema["/v2/models/{name}"]["GET"].Case(path_parameters={"name": "served"})
    metadata.validate_response(metadata.call(base_url=f"http://{server.address}"), checks=CHECKS)


def test_grpc_carries_elements_in_contents(server):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc_address))
    request = service_pb2.ModelInferRequest(model_name="served")
    request.inputs.add(name="image", datatype="BYTES", shape=[2, 1]).contents.bytes_contents.extend([jpeg(5), b"grey6"])
    request.inputs.add(name="gain", datatype="FP32", shape=[2, 1]).contents.fp32_contents.extend([1, 2])
    require_right(triton_grpc.InferResult(stub.ModelInfer(request)), 5, 12)


@pytest.fixture
def region(server):
    """Return a function that makes a registered region, which is undone afterwards."""
    made = []

    def make(name, size):
        handle = shared_memory.create_shared_memory_region(name, f"/bytes_{name}", size)
        made.append((name, handle))
        connect(triton_http, server).register_system_shared_memory(name, f"/bytes_{name}", size)
        return handle

    yield make
    for name, handle in made:
        connect(triton_http, server).unregister_system_shared_memory(name)
        shared_memory.destroy_shared_memory_region(handle)


@PROTOCOLS
def test_elements_are_read_from_shared_memory_and_written_there(server, region, triton):
    packed = b"".join(struct.pack("<I", len(each)) + each for each in (jpeg(10), jpeg(90)))
    source, target = region("in", len(packed)), region("out", 100)
    shared_memory.set_shared_memory_region(source, [np.frombuffer(packed, np.uint8)])
    given = inputs_of(triton, objects("x", "y"))
    given[0].set_shared_memory("in", len(packed))
    text = triton.InferRequestedOutput("text")
    text.set_shared_memory("out", 100)
    answer = connect(triton, server).infer("served", given, outputs=[text, triton.InferRequestedOutput("mean")])
    written = shared_memory.get_contents_as_numpy(target, np.object_, [2, 2])
    assert written.tolist() == [text_of(10), text_of(90)]
    np.testing.assert_allclose(answer.as_numpy("mean"), [[10] * 3, [90] * 3], atol=0.5)


@PROTOCOLS
def test_a_place_in_shared_memory_that_an_answer_does_not_fit_into_is_refused(server, region, triton):
    region("small", 20)
    text = triton.InferRequestedOutput("text")
    text.set_shared_memory("small", 20)
    with pytest.raises(InferenceServerException, match="an output has 24 bytes, and its place in shared memory region"):
        connect(triton, server).infer("served", inputs_of(triton, objects("grey 100")), outputs=[text])


@pytest.mark.parametrize("ring", ["auto", "off"])
def test_our_client_sends_files_and_gets_text(server, ring):
    with Client(f"http://{server.address}", ring=None if ring == "auto" else ring) as client:
        images = [jpeg(11), "grey 22"]
        answer = client.infer("served", {"image": images, "gain": np.ones((2, 1), np.float32)})
        assert client.transport == ("ring" if ring == "auto" else "http")
        assert answer["text"].tolist() == [text_of(11), text_of(22)]
        assert answer["raw"].tolist() == [[b"\xff\x0b"], [b"\xff\x16"]]
        assert answer["mean"].dtype == np.float32
        gain = np.ones((1, 1), np.float32)
        with pytest.raises(InvalidRequest, match=f"at most {MOST}|4 to {MOST + 4}"):
            client.infer("served", {"image": [bytes(MOST + 1)], "gain": gain})
        with pytest.raises(InvalidRequest, match="cannot take row 0: ValueError: 4 bytes that are no JPEG file"):
            client.infer("served", {"image": [b"nope"], "gain": gain})
        with pytest.raises(RunFailed, match=r"preprocess failed: KeyError: 'bug in \(path\)'"):
            client.infer("served", {"image": [b"bug"], "gain": gain})
        with pytest.raises(InvalidRequest, match="input image holds int; the model takes BYTES"):
            client.infer("served", {"image": [5], "gain": gain})
        with pytest.raises(InvalidRequest, match="input image is BYTES, so no memory can be made"):
            client.allocate("served", 1).__enter__()
        after = client.infer("served", {"image": np.array([["grey 7"]]), "gain": gain})
        assert after["text"].tolist() == [text_of(7)]


def test_many_of_our_clients_requests_at_once_are_answered_each_with_its_own(server):
    async def many():
        async with AsyncClient(f"http://{server.address}") as client:

            async def one(shade):
                inputs = {"image": [jpeg(shade)], "gain": np.ones((1, 1), np.float32)}
                return (await client.infer("served", inputs))["text"].tolist()

            return await asyncio.gather(*(one(shade) for shade in range(100, 140)))

    assert asyncio.run(many()) == [[text_of(shade)] for shade in range(100, 140)]


def test_metadata_says_bytes(server):
    expected = [("image", "BYTES", [-1, 1]), ("gain", "FP32", [-1, 1])]
    told = connect(triton_http, server).get_model_metadata("served")
    assert [(each["name"], each["datatype"], each["shape"]) for each in told["inputs"]] == expected
    assert told["inputs"][0]["parameters"] == {"max_bytes": MOST}
    grpc_told = connect(triton_grpc, server).get_model_metadata("served")
    assert [(each.name, each.datatype, list(each.shape)) for each in grpc_told.inputs] == expected
    assert [(each.name, each.datatype, list(each.shape)) for each in grpc_told.outputs] == [
        ("text", "BYTES", [-1, 2]),
        ("raw", "BYTES", [-1, 1]),
        ("mean", "FP32", [-1, 3]),
    ]
    config = connect(triton_grpc, server).get_model_config("served").config
    assert [(each.data_type, list(each.dims)) for each in config.input] == [(13, [1]), (11, [1])]  # TYPE_STRING


def test_damaged_files_among_good_ones_fail_alone(server):
    whole = jpeg(33)
    damaged = [whole[: len(whole) // 2], b"nope", b"", whole[:-40], b"\xff\xd8\xff"]

    def one(number):
        image = damaged[number % len(damaged)] if number % 2 else jpeg(number)
        data = base64.b64encode(image).decode()
        return ask(server, data, content_type="base64")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(40)))
    for number, (status, answer) in enumerate(answers):
        if number % 2:
            assert (status, "the model cannot take row 0: ValueError: " in answer["error"]) == (400, True), answer
        else:
            assert outputs_of(answer)["text"] == [text.decode() for text in text_of(number)]


def test_a_damaged_file_is_named_by_its_row(server):
    status, answer = ask(server, "grey 1", "grey x", "grey 3")
    assert (status, "cannot take row 1: ValueError" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("images", "shape", "words"),
    [
        (
            ["x" * (MOST + 1)],
            [1],
            f"element 0 of tensor image has {MOST + 1} bytes, and the model takes at most {MOST}",
        ),
        (["a", "b"], [1], "input image has 2 strings; its shape needs 1"),
        (["a"], [2, 1], "input image has 1 strings; its shape needs 2"),
        (["a", "b"], [1, 2], "input image has shape [1, 2]; the model takes [rows, 1]"),
        ([7], [1], "input image is BYTES; its data must be strings"),
        (["grey 1"] * 5, [5], "the request has 5 rows, and the model takes at most 4"),
    ],
)
def test_what_the_model_cannot_take_is_refused_with_the_reason(server, images, shape, words):
    status, answer = ask(server, *images, shape=shape)
    assert (status, words in answer["error"]) == (400, True), answer


@PROTOCOLS
@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (struct.pack("<I", MOST + 1) + bytes(MOST + 1), f"has {MOST + 5} bytes in "),
        (struct.pack("<I", 9) + b"abc", "an element ends 6 bytes behind them"),
        (2 * (struct.pack("<I", 1) + b"a"), "tensor image has 2 elements; its shape needs 1"),
        (b"abc", "1 rows of it have 4 to "),
    ],
)
def test_packed_elements_that_do_not_fit_are_refused_with_the_reason(server, triton, packed, words):
    given = inputs_of(triton, objects("x"))
    if triton is triton_http:
        given[0]._raw_data = packed
        given[0]._parameters["binary_data_size"] = len(packed)
    else:
        given[0]._raw_content = packed
    with pytest.raises(InferenceServerException, match=words) as error:
        connect(triton, server).infer("served", given)
    assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_what_the_models_own_steps_raise_is_the_models_failure(server):
    assert ask(server, "bug") == (500, {"error": "ModelError: preprocess failed: KeyError: 'bug in (path)'"})
    assert ask(server, "grey 66") == (500, {"error": "ModelError: postprocess failed: ValueError: sixty-six"})


class Held:
    """A server of its own whose only preparing thread is held."""

    def __init__(self, folder, pool):
        self.server = Server(folder, "--preprocess-threads", "1", model=MODEL)
        self.answers = [pool.submit(ask, self.server, "hold")]
        with self.server.gate.open("w"):  # opens when the model has opened the other end
            pass
        assert self.answers.pop().result(WAIT_S)[0] == 200
        self.pool = pool

    def hold(self):
        """Keep the thread busy until `release`; return the request's future and what releases it."""
        future = self.pool.submit(ask, self.server, "hold")
        return future, self.server.gate.open("w")  # opens when the thread is there


@pytest.fixture
def held(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        held = Held(tmp_path, pool)
        yield held
        if held.server.process.poll() is None:
            assert held.server.stop() == 0


def test_while_rows_are_prepared_deadlines_and_departures_count_and_nothing_is_lost(held):
    server = held.server
    future, gate = held.hold()
    body = body_of("grey 1") | {"parameters": {"timeout": 20_000}}
    status, _, answer = server.call(PATH, body)
    assert (status, b"longer than its deadline allows" in answer) == (504, True)
    data = json.dumps(body_of("grey 2")).encode()
    for _ in range(40):  # more than there are rows
        with socket.create_connection(server.address.split(":"), WAIT_S) as client:
            client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(data)))
            client.sendall(data)
    gate.close()
    assert future.result(WAIT_S)[0] == 200
    assert outputs_of(ask(server, *["grey 3"] * 4)[1])["text"] == ["red 3", "grün 3"] * 4


def test_a_backend_that_is_killed_while_it_prepares_is_told_at_once_and_replaced(held):
    server = held.server
    future, gate = held.hold()
    waiting = [held.pool.submit(ask, server, f"grey {shade}") for shade in range(3)]
    with Client(f"http://{server.address}") as client:
        inputs = {"image": ["grey 4"], "gain": np.ones((1, 1), np.float32)}
        ours = client.submit("served", inputs)
        server.backend().kill()
        assert [each.result(WAIT_S)[0] for each in (future, *waiting)] == [503] * 4
        assert ours.exception(WAIT_S) is not None or ours.result()["text"].tolist() == [text_of(4)]
        gate.close()
        server.wait_for("ready")
        while not server.is_ready():
            pass
        assert client.infer("served", inputs)["text"].tolist() == [text_of(4)]
    assert ask(server, "grey 5")[0] == 200


def test_a_server_that_is_told_to_stop_answers_what_it_prepares(held):
    server = held.server
    future, gate = held.hold()
    waiting = held.pool.submit(ask, server, "grey 9")
    held.server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    gate.close()
    assert future.result(WAIT_S)[0] == 200
    assert waiting.result(WAIT_S)[0] in (200, 503)
    assert server.process.wait(WAIT_S) == 0
