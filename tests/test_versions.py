"""A real server of a folder of models: versions come and go under load, and no request is lost or answered wrongly."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import psutil
import pytest
import torch

WAIT_S = 120
CLIENTS = 6
MODEL = """
import torch

class Model(torch.nn.Module):
    def forward(self, values):
        return {{"answer": values * {factor}}}

def build():
    return Model()

def example_inputs():
    return {{"values": torch.zeros(2, 3)}}
"""
HELD = "held = open(__file__)\n"  # a test finds the process by it


class Server:
    """`headrace serve FOLDER` in a process of its own."""

    def __init__(self, folder, *options):
        self.folder = folder
        self.lines: list[str] = []
        self._ended = False  # it will say nothing more
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "headrace", "serve", str(folder), "--device", "cpu", "--http-port", "0"),
                *("--no-grpc", "--max-batch-size", "4", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            host, port = re.search(r"http://([\d.]+):(\d+)/", self.wait_for("ready: ")).groups()
        except BaseException:
            self.process.kill()
            raise
        self.address = host, int(port)

    def _read(self):
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self._ended = True
            self._said.notify_all()

    def wait_for(self, words):
        def said():
            return next((line for line in self.lines if words in line), None)

        with self._said:
            self._said.wait_for(lambda: said() or self._ended, WAIT_S)
            line = said()
            assert line, f"not said: {words}; said: {''.join(self.lines)}"
            return line

    def call(self, path, body=None, connection=None):
        """Return status and decoded body."""
        connection = connection or http.client.HTTPConnection(*self.address, timeout=WAIT_S)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if data is None else "POST", path, data)
        response = connection.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data else None

    def infer(self, model, values, connection=None):
        inputs = [{"name": "values", "shape": [1, 3], "datatype": "FP32", "data": values}]
        return self.call(f"/v2/models/{model}/infer", {"inputs": inputs}, connection)

    def change(self, verb, model, body=None):
        return self.call(f"/v2/repository/models/{model}/{verb}", body or {})

    def index(self, model):
        _, index = self.call("/v2/repository/index", {})
        return {each["version"]: (each["state"], each["reason"]) for each in index if each["name"] == model}

    def until_ready(self):
        while self.call("/v2/health/ready")[0] != 200:
            pass

    def process_of(self, name):
        """Return the process that holds a file of this model open."""
        children = psutil.Process(self.process.pid).children()
        folder = str(self.folder / name)
        (found,) = (child for child in children if any(folder in file.path for file in child.open_files()))
        return found


def write(folder, name, version, text=None):
    place = folder / name / str(version)
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.py").write_text(MODEL.format(factor=version) if text is None else text)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my models")
    write(folder, "cat", 1, HELD + MODEL.format(factor=1))
    write(folder, "dog", 1)
    server = Server(folder, "--model-control", "explicit", "--frontends", "2")
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0


@contextmanager
def load_on(server, model):
    """Ask all the time from several connections; yield what is answered to each: (status, version, factor)."""
    answers = [[] for _ in range(CLIENTS)]
    stop = threading.Event()
    warm = threading.Barrier(CLIENTS + 1)

    def ask(number):
        connection = http.client.HTTPConnection(*server.address, timeout=WAIT_S)
        base, asked = 100.0 * number, 0
        while not stop.is_set():
            asked += 1
            values = [base + asked, 1.0, -1.0]
            status, body = server.infer(model, values, connection)
            factor = None
            if status == 200:
                got = body["outputs"][0]["data"]
                factor = got[1]
                assert got == [value * factor for value in values], "another request's answer"
            answers[number].append((status, body.get("model_version"), factor))
            if asked == 3:
                warm.wait(WAIT_S)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    warm.wait(WAIT_S)
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)


def test_two_models_are_served_and_listed(server):
    assert server.infer("cat", [1, 2, 3])[1]["outputs"][0]["data"] == [1, 2, 3]
    assert server.infer("dog", [1, 2, 3])[0] == 200
    assert server.index("cat") == {"1": ("READY", "")}
    assert server.call("/v2/models/dog")[1]["versions"] == ["1"]


def test_a_model_goes_on_while_the_backend_of_another_is_dead(server):
    with load_on(server, "dog") as answers:
        server.process_of("cat").kill()
        server.wait_for("the backend of cat version 1 ended")
        while server.call("/v2/health/ready")[0] == 200:  # until one of the frontends has heard of it
            pass
        assert server.call("/v2/models/dog/ready")[0] == 200
        server.wait_for("cat version 1: ready again")
        server.until_ready()
    assert {status for each in answers for status, _, _ in each} == {200}
    assert server.infer("cat", [1, 2, 3])[0] == 200


def test_a_version_is_switched_under_load_once_and_no_request_is_lost_or_wrong(server):
    write(server.folder, "cat", 2)
    with load_on(server, "cat") as answers:
        assert server.change("load", "cat") == (200, None)
        seen = [server.infer("cat", [0, 1, 0])[1]["model_version"] for _ in range(20)]
        server.wait_for("cat: loaded")
    assert set(seen) == {"2"}, "whoever was told that it is loaded, meets it everywhere"
    for each in answers:
        assert {status for status, _, _ in each} == {200}
        assert [version for version, _ in groupby(version for _, version, _ in each)] == ["1", "2"]
        assert all(float(version) == factor for _, version, factor in each)
    while server.index("cat")["1"][0] != "UNAVAILABLE":
        pass
    assert server.index("cat") == {"1": ("UNAVAILABLE", "unloaded"), "2": ("READY", "")}
    status, body = server.call("/v2/models/cat/versions/1/ready")
    assert (status, body["error"]) == (404, "version 1 of model cat is not loaded: unloaded")


def test_a_version_that_fails_leaves_the_old_one_serving_and_the_caller_is_told_why(server):
    write(server.folder, "cat", 3, "def build():\n    raise ValueError('no weights in /srv/secret')\n")
    with load_on(server, "cat") as answers:
        status, body = server.change("load", "cat")
    (server.folder / "cat" / "3" / "model.py").unlink()
    assert status == 400
    assert "ValueError: no weights in (path) (line 2 of model.py)" in body["error"]
    assert str(server.folder) not in body["error"]
    assert set(Counter(answer for each in answers for answer in each)) == {(200, "2", 2.0)}
    state, reason = server.index("cat")["3"]
    assert state == "UNAVAILABLE"
    assert "no weights" in reason
    assert server.call("/v2/health/ready")[0] == 200


def test_a_new_model_is_loaded_and_unloaded_and_an_exported_program_is_one(server):
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(2, 3),), dynamic_shapes=({0: rows},))
    (server.folder / "fox" / "5").mkdir(parents=True)
    torch.export.save(program, server.folder / "fox" / "5" / "model.pt2")
    assert server.call("/v2/models/fox/ready")[0] == 404
    assert server.change("load", "fox") == (200, None)
    assert server.call("/v2/models/fox")[1]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}]
    assert server.change("unload", "fox", {"parameters": {"unload_dependents": False}}) == (200, None)
    for _ in range(8):  # whichever frontend is asked
        status, body = server.call("/v2/models/fox/ready")
        assert status == 404
        assert "model fox is not loaded" in body["error"]
    assert server.call("/v2/health/ready")[0] == 200


@pytest.mark.parametrize(
    ("verb", "model", "body", "status", "words"),
    [
        ("load", "bird", {}, 404, "no model 'bird'"),
        ("unload", "bird", {}, 404, "no model 'bird'"),
        ("load", "..%2Fdog", {}, 404, "no name of a model"),
        ("load", "dog", {"parameters": {"config": "{}"}}, 400, "load takes no parameter config"),
        ("unload", "dog", {"parameters": {"x": 1}}, 400, "unload takes no parameter x"),
        ("load", "dog", [], 400, "no load or unload request"),
    ],
    ids=["unknown", "unknown to unload", "a path", "a parameter", "a parameter of unload", "another body"],
)
def test_a_change_that_cannot_be_is_refused(server, verb, model, body, status, words):
    got, answer = server.call(f"/v2/repository/models/{model}/{verb}", body)
    assert (got, words in answer["error"]) == (status, True), answer


def test_what_has_not_changed_is_not_loaded_again(server):
    before = {child.pid for child in psutil.Process(server.process.pid).children()}
    assert server.change("load", "dog") == (200, None)
    assert {child.pid for child in psutil.Process(server.process.pid).children()} == before


@pytest.fixture
def own_server(tmp_path):
    """Starts a server of two versions of one model, which the test may stop."""
    write(tmp_path, "cat", 1, HELD + MODEL.format(factor=1))
    write(tmp_path, "cat", 2)
    servers = []

    def start(*options):
        servers.append(Server(tmp_path, "--versions", "all", *options))
        return servers[0]

    yield start
    servers[0].process.kill()
    servers[0].process.wait(WAIT_S)


def test_without_leave_no_client_loads_or_unloads_and_all_versions_serve_if_asked_for(own_server):
    server = own_server()
    assert server.index("cat") == {"1": ("READY", ""), "2": ("READY", "")}
    assert server.call("/v2/models/cat")[1]["versions"] == ["1", "2"]
    assert [server.call(f"/v2/models/cat/versions/{n}/ready")[0] for n in (1, 2)] == [200, 200]
    assert server.infer("cat", [0, 1, 0])[1]["model_version"] == "2", "the newest, where none is asked for"
    for verb in ("load", "unload"):
        status, body = server.change(verb, "cat")
        assert status == 403
        assert "--model-control explicit" in body["error"]


def test_the_death_of_a_backend_that_nobody_has_used_is_noticed_too(own_server):
    server = own_server()
    server.process_of("cat").kill()
    server.wait_for("the backend of cat version 1 ended")
    while server.call("/v2/health/ready")[0] == 200:
        pass
    assert server.infer("cat", [0, 1, 0])[1]["model_version"] == "2"
    server.wait_for("cat version 1: ready again")
    server.until_ready()
    assert server.call("/v2/models/cat")[1]["versions"] == ["1", "2"]


def test_the_end_waits_for_no_load_and_tells_who_asked_for_it(own_server):
    server = own_server("--model-control", "explicit")
    gate = server.folder / "gate"
    os.mkfifo(gate)
    write(server.folder, "slow", 1, f"def build():\n    open({str(gate)!r})\n")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.change, "load", "slow")
        while server.index("slow").get("1", ("", ""))[0] != "LOADING":
            pass
        server.process.send_signal(signal.SIGTERM)
        assert asked.result(WAIT_S) == (503, {"error": "the server is stopping"})
    assert server.process.wait(WAIT_S) == 0


def test_a_second_signal_does_not_wait_for_any_backend(own_server, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    stuck = MODEL.format(factor=1).replace(
        "        return", f"        if (values == 77).any():\n            open({str(gate)!r})\n        return"
    )
    write(tmp_path, "stuck", 1, stuck)
    server = own_server()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.infer, "stuck", [77, 0, 0])
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0
        assert asked.exception(WAIT_S) is not None, "it can never be answered"
