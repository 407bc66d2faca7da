"""A real server, its processes and all, as clients meet it: right answers, clear refusals, and nobody left waiting."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import tritonclient.http as triton

from tests.commands import call, run
from tests.serving import WAIT_S, Server, infer_body

ON_CPU = ("--device", "cpu", "--http-port", "0", "--grpc-port", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--frontends", "2")
    yield server
    assert server.stop() == 0
    assert not psutil.pid_exists(server.process.pid)


def triton_inputs(rows, seed, *, binary):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, 3)).astype(np.float32)
    ids = generator.integers(14, 70, (rows, 4))
    inputs = [triton.InferInput("values", [rows, 3], "FP32"), triton.InferInput("ids", [rows, 4], "INT64")]
    for given, data in zip(inputs, (values, ids), strict=True):
        given.set_data_from_numpy(data, binary_data=binary)
    return inputs, values, ids


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_known_client_gets_the_models_answers(server, rows, binary):
    client = triton.InferenceServerClient(server.address)
    inputs, values, ids = triton_inputs(rows, 1, binary=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("sum", "doubled")]
    answer = client.infer("served", inputs, outputs=outputs, request_id="r1")
    np.testing.assert_array_equal(answer.as_numpy("doubled"), values * 2)
    np.testing.assert_array_equal(answer.as_numpy("sum"), ids.sum(1))
    assert answer.get_response()["id"] == "r1"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_known_client_may_compress_both_ways(server, algorithm):
    inputs, values, _ = triton_inputs(4, 2, binary=True)
    answer = triton.InferenceServerClient(server.address).infer(
        "served",
        inputs,
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(answer.as_numpy("doubled"), values * 2)


def test_what_the_client_asks_of_the_server_is_answered(server):
    client = triton.InferenceServerClient(server.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("served")
    assert client.is_model_ready("served", "1")
    assert client.get_server_metadata()["name"] == "headrace"
    metadata = client.get_model_metadata("served")
    assert metadata["inputs"][1] == {"name": "ids", "datatype": "INT64", "shape": [-1, 4]}
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["doubled", "sum"]
    assert client.get_model_config("served")["max_batch_size"] == 4
    statistics = client.get_inference_statistics("served")["model_stats"][0]
    assert statistics["inference_stats"]["success"]["count"] >= 0
    assert client.get_model_repository_index()[0]["state"] == "READY"


def test_many_requests_at_once_get_each_their_own_answer(server):
    def ask(seed):
        client = triton.InferenceServerClient(server.address)
        inputs, values, _ = triton_inputs(1 + seed % 4, seed, binary=bool(seed % 2))
        return np.array_equal(client.infer("served", inputs).as_numpy("doubled"), values * 2)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(80)))


def test_a_model_that_raises_fails_its_own_request_only(server):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.infer, [[value, 0, 0, 0] for value in range(10, 18)]))
    assert [status for status, _, _ in answers] == [200, 200, 200, 500, 200, 200, 200, 200]
    assert json.loads(answers[3][2]) == {"error": "ValueError: thirteen in (path), http://a/b"}


@pytest.mark.parametrize(
    ("path", "options", "status", "words"),
    [
        ("/v2/models/served/infer", {"body": b"{"}, 400, "no v2 infer request"),
        ("/v2/models/served/infer", {"body": infer_body([1, 2, 3])}, 400, "has 3 values"),
        ("/v2/models/other/infer", {"body": infer_body([1, 2, 3, 4])}, 404, "there is no model other"),
        ("/v2/models/served/versions/9/infer", {"body": infer_body([1, 2, 3, 4])}, 404, "no version 9"),
        ("/v2/models/served/infer", {}, 405, "Method Not Allowed"),
        ("/v2/nothing", {}, 404, "Not Found"),
        (
            "/v2/models/served/infer",
            {"body": b"{}", "headers": {"Inference-Header-Content-Length": "x"}},
            400,
            "must be a number of bytes",
        ),
    ],
    ids=["no JSON", "wrong shape", "unknown model", "unknown version", "method", "path", "header length"],
)
def test_bad_requests_are_told_what_is_wrong(server, path, options, status, words):
    got, _, body = server.call(path, **options)
    assert got == status
    assert words in json.loads(body)["error"]


def test_more_rows_than_a_batch_are_refused(server):
    inputs, _, _ = triton_inputs(5, 0, binary=True)
    with pytest.raises(triton.InferenceServerException, match="has 5 rows, and the model takes at most 4"):
        triton.InferenceServerClient(server.address).infer("served", inputs)


@pytest.fixture(scope="module")
def small_server(tmp_path_factory):
    options = ("--queue-rows", "4", "--max-body-bytes", "2000", "--body-timeout", "0.5")
    server = Server(tmp_path_factory.mktemp("small"), *options)
    yield server
    assert server.stop() == 0


@pytest.fixture
def mortal_server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait(WAIT_S)


def test_beyond_its_room_the_server_refuses_at_once_and_says_when_to_come_back(small_server):
    with ThreadPoolExecutor(8) as pool:
        held = [small_server.hold(pool)]
        while True:  # the first to find the room taken is refused; the rest are held
            done = {future for future in held if future.done()}
            refused = [future.result() for future in done if future.result()[0] == 503]
            if refused:
                break
            held.append(pool.submit(small_server.infer, [1, 0, 0, 0]))
        assert refused[0][1]["Retry-After"] == "1"
        assert "no 1 rows are free" in json.loads(refused[0][2])["error"]
        small_server.release()
        statuses = [future.result(WAIT_S)[0] for future in held]
    assert set(statuses) == {200, 503}
    assert small_server.infer([1, 1, 1, 1])[0] == 200, "the room is free again"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small_server):
    status, _, body = small_server.call("/v2/models/served/infer", b"x" * 2001)
    assert status == 413
    assert "2001 bytes, and the server takes 2000" in json.loads(body)["error"]


def test_a_body_that_does_not_come_is_given_up(small_server):
    host, port = small_server.address.split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        connection.sendall(b"POST /v2/models/served/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408")
    assert small_server.infer([1, 1, 1, 1])[0] == 200


def test_a_request_that_a_dead_backend_held_is_answered_and_the_next_backend_serves(small_server):
    with ThreadPoolExecutor(2) as pool:
        held = small_server.hold(pool)
        small_server.gate.open("w").close()  # opens only when the model has it: now it is surely held
        assert held.result(WAIT_S)[0] == 200
        held = small_server.hold(pool)
        writer = small_server.gate.open("w")
        small_server.backend().kill()
        status, headers, body = held.result(WAIT_S)
        writer.close()
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert "the backend ended while it held this request" in json.loads(body)["error"]
    assert small_server.call("/v2/health/ready")[0] == 503
    assert small_server.call("/v2/health/live")[0] == 200
    small_server.wait_for("ready again")
    while small_server.call("/v2/health/ready")[0] != 200:
        pass
    assert small_server.infer([1, 2, 3, 4])[0] == 200


def test_a_frontend_that_dies_leaves_nothing_in_the_backend_and_is_started_anew(small_server):
    backend = small_server.backend()
    for _ in range(2):
        frontend = small_server.frontend()
        with ThreadPoolExecutor(1) as pool:
            held = small_server.hold(pool)
            writer = small_server.gate.open("w")
            frontend.kill()
            writer.close()
            with pytest.raises(OSError, match=r"\w"):
                held.result(WAIT_S)
        small_server.wait_for("is started anew")
        while not small_server.is_ready():
            pass
        assert small_server.infer([1, 2, 3, 4])[0] == 200
    assert backend.is_running()
    assert len(set(rings_of(backend.pid))) <= 2, "the one in use, and perhaps the last batch's"


def rings_of(pid):
    with open(f"/proc/{pid}/maps") as maps:  # noqa: PTH123
        return [line.split()[4] for line in maps if "headrace-ring" in line]


def test_the_end_waits_for_what_was_taken(mortal_server):
    with ThreadPoolExecutor(2) as pool:
        held = mortal_server.hold(pool)
        writer = mortal_server.gate.open("w")
        mortal_server.process.send_signal(signal.SIGTERM)
        mortal_server.wait_for("stopping")
        writer.close()
        assert held.result(WAIT_S)[0] == 200
    assert mortal_server.process.wait(WAIT_S) == 0


def test_a_second_signal_does_not_wait(mortal_server):
    with ThreadPoolExecutor(2) as pool:
        held = mortal_server.hold(pool)
        writer = mortal_server.gate.open("w")
        mortal_server.process.send_signal(signal.SIGTERM)
        mortal_server.wait_for("stopping")
        mortal_server.process.send_signal(signal.SIGTERM)
        assert mortal_server.process.wait(WAIT_S) == 0
        with pytest.raises(Exception, match=r"\w"):  # whatever a closed connection raises
            held.result(WAIT_S)
        writer.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["no_such_model"], "there is no such model"),
        (["resnet18", "--host", "203.0.113.1"], "cannot listen there"),
        (["{folder}/raises.py:build"], "the callable failed"),
    ],
    ids=["model", "address", "callable"],
)
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path, options, words):
    (tmp_path / "raises.py").write_text("def build():\n    raise ValueError('no')\n")
    ended = run("serve", *ON_CPU, *(option.format(folder=tmp_path) for option in options), cwd=tmp_path)
    assert ended.code != 0
    assert words in ended.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["resnet18", "--http-port", "99999"], "must be 0 to 65535"),
        (["resnet18", "--grpc-port", "99999"], "must be 0 to 65535"),
        (["resnet18", "--frontends", "0"], "must be 1 to 64"),
        (["resnet18", "--tls-cert", "x.pem"], "give both or neither"),
        (["resnet18", "--tls-client-ca", "x.pem"], "add --tls-cert and --tls-key"),
        (["resnet18", "--token-file", "none"], "cannot be read (No such file"),
        (["resnet18", "--max-connections", "0"], "must be at least 1"),
    ],
    ids=["port", "gRPC port", "frontends", "key", "client CA", "tokens", "connections"],
)
def test_options_that_no_server_can_have_are_refused_at_once(tmp_path, options, words):
    ended = call("serve", *ON_CPU, *options, cwd=tmp_path)
    assert ended.code != 0
    assert words in ended.message
