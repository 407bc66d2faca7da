"""Two GPUs in one host: an engine on each, behind the same frontends. Skipped where there are fewer.

`--log-cli-level INFO` shows what was measured.
"""

import json
import logging
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from headrace.gpus import choose_gpus
from headrace.model.compiled import identity
from headrace.placement import places
from tests.serving import WAIT_S, Server
from tests.test_ending import when_readable
from tests.test_failures import in_flight, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
# Tells which GPU computed, by its UUID as CUDA knows it, and in which process.
MODEL = """
import os
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        uuid = torch.cuda.get_device_properties(0).uuid
        self.register_buffer("who", torch.tensor([os.getpid(), int(str(uuid)[:8], 16)]))

    def forward(self, ids):
        return {"who": torch.cat([ids + 1, self.who.expand(len(ids), 2)], 1)}

def build():
    return Model()

def example_inputs():
    return {"ids": torch.zeros(2, 1, dtype=torch.int64)}
"""
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--gpus", "0,1", model=MODEL)
    yield server
    assert server.stop() == 0


def ask(server, number):
    given = {"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [number]}
    status, _, body = server.call("/v2/models/served/infer", {"inputs": [given]})
    if status != 200:
        return status, None, None
    answer, pid, gpu = json.loads(body)["outputs"][0]["data"]
    assert answer == number + 1
    return status, pid, gpu


def ask_many(server, count=400):
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda number: ask(server, number), range(count)))


def first_digits(gpu):
    return int(gpu.uuid.removeprefix("GPU-")[:8], 16)


def test_each_gpu_answers_about_half(server):
    gpus = {first_digits(gpu) for gpu in choose_gpus("0,1")}

    def shared():
        answers = ask_many(server)
        assert {status for status, _, _ in answers} == {200}
        by_gpu = Counter(gpu for _, _, gpu in answers)
        assert by_gpu.keys() <= gpus
        return len(by_gpu) == len(gpus) and min(by_gpu.values()) > 0.25 * len(answers)

    # An engine whose first answers were slow is passed over for two seconds, see `routing.STALE_NS`.
    until(shared)
    metrics = server.call("/metrics")[2].decode()
    assert all(f'nv_gpu_memory_used_bytes{{gpu_uuid="{gpu.uuid}"}}' in metrics for gpu in choose_gpus("0,1"))


def test_an_engine_that_is_killed_costs_its_share_and_comes_back_on_its_gpu(server):
    gpus = {pid: gpu for _, pid, gpu in ask_many(server)}
    victim = min(gpus)
    ended_fd = os.pidfd_open(victim)
    psutil.Process(victim).suspend()  # so that it holds some of these when it is killed
    with ThreadPoolExecutor(33) as pool:
        ended = pool.submit(when_readable, ended_fd)
        asked = [pool.submit(lambda number: (*ask(server, number), time.monotonic()), number) for number in range(32)]
        until(lambda: in_flight(server) == sum(not future.done() for future in asked) > 0)
        killed_s = time.monotonic()
        psutil.Process(victim).kill()
        answers = [future.result(WAIT_S) for future in asked]
        ended_s = ended.result(WAIT_S)
    os.close(ended_fd)
    told = [at_s for status, *_, at_s in answers if status != 200]
    _log.info(
        "killed: told after %.1f ms, ended after %.1f", *((at_s - killed_s) * 1e3 for at_s in (max(told), ended_s))
    )
    assert {status for status, *_ in answers} == {200, 503}
    assert max(told) - killed_s < (ended_s - killed_s) / 2
    assert {status for status, _, _ in ask_many(server)} == {200}
    server.wait_for("ready again")
    deadline = time.monotonic() + WAIT_S
    while len(now := {pid: gpu for _, pid, gpu in ask_many(server)}) < 2:
        assert time.monotonic() < deadline
    assert victim not in now
    assert set(now.values()) == set(gpus.values())


def test_an_engines_cpus_are_those_of_its_gpus_node_where_the_machine_has_several():
    for place in places("cuda", choose_gpus("0,1"), 1):
        assert place.cpus is None or place.cpus < os.sched_getaffinity(0)


def test_a_compiled_program_is_looked_up_by_the_gpu_that_it_was_made_for():
    found = [identity(torch.nn.Linear(2, 2).to(f"cuda:{number}")) for number in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
