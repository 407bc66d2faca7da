"""The numbers of a real server: any of several frontends tells those of all, and they outlive its processes."""

import json
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.frontend.test_metrics import written
from tests.test_serve import Server

STATS = "/v2/models/served/stats"
ASKS = 12  # each on a connection of its own, which any frontend may take


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--frontends", "2")
    yield server
    assert server.stop() == 0


def stats(server):
    (told,) = json.loads(server.call(STATS)[2])["model_stats"]
    return told


def counts(server):
    inference = stats(server)["inference_stats"]
    return inference["success"]["count"], inference["fail"]["count"]


def metric(server, name):
    text = server.call("/metrics")[2].decode()
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if written(sample.name, text) == name
    }


def test_every_frontend_tells_the_numbers_of_all(server):
    answered, failed = counts(server)
    ids = [[13, 0, 0, 0] if number % 10 == 0 else [1, 2, 3, 4] for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for status, _, _ in pool.map(server.infer, ids)]
        server.call("/v2/models/served/infer", b"{")
    assert statuses.count(200) == 54
    for _ in range(ASKS):
        assert counts(server) == (answered + 54, failed + 7)
        assert list(metric(server, "nv_inference_request_success").values()) == [answered + 54]
    told = stats(server)
    assert told["inference_count"] == answered + 54
    assert 0 < told["execution_count"] <= told["inference_count"]
    assert sum(batch["compute_infer"]["count"] for batch in told["batch_stats"]) == told["execution_count"]
    assert told["inference_stats"]["compute_infer"]["ns"] <= told["inference_stats"]["success"]["ns"]


def wait_for_all_frontends(server):
    """Return when each is ready again: one may be so before another."""
    while not all(server.is_ready() for _ in range(ASKS)):
        pass


def test_numbers_outlive_the_processes(server):
    server.infer([1, 2, 3, 4])
    before = counts(server)
    backend = server.backend()
    for child in psutil.Process(server.process.pid).children():
        if child.pid != backend.pid and "spawn_main" in " ".join(child.cmdline()):
            child.kill()
            server.wait_for("is started anew")
    wait_for_all_frontends(server)
    for _ in range(ASKS):
        assert counts(server) == before
    backend.kill()
    server.wait_for("ready again")
    wait_for_all_frontends(server)
    assert list(metric(server, "headrace_backend_restarts_total").values()) == [1]
    assert server.infer([1, 2, 3, 4])[0] == 200
    answered, _ = counts(server)
    assert answered == before[0] + 1
