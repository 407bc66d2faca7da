"""Two GPUs in one host: an engine on each, behind the same frontends. Skipped where there are fewer."""

import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.gpus import choose_gpus
from headrace.model.compiled import identity
from headrace.placement import places
from tests.serving import WAIT_S, Server

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
    answers = ask_many(server)
    assert {status for status, _, _ in answers} == {200}
    by_gpu = Counter(gpu for _, _, gpu in answers)
    assert by_gpu.keys() == {first_digits(gpu) for gpu in choose_gpus("0,1")}
    assert min(by_gpu.values()) > 0.25 * len(answers)
    metrics = server.call("/metrics")[2].decode()
    assert all(f'nv_gpu_memory_used_bytes{{gpu_uuid="{gpu.uuid}"}}' in metrics for gpu in choose_gpus("0,1"))


def test_an_engine_that_is_killed_costs_its_share_and_comes_back_on_its_gpu(server):
    gpus = {pid: gpu for _, pid, gpu in ask_many(server)}
    victim = min(gpus)
    os.kill(victim, signal.SIGKILL)
    answers = ask_many(server)
    lost = [status for status, _, _ in answers if status != 200]
    assert set(lost) <= {503}
    assert len(lost) <= 16, "one for each that could wait there"
    assert {pid for _, pid, _ in answers} - {None} <= set(gpus)
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
