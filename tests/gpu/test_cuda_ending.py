"""A backend with a GPU and pinned memory is killed: its clients hear of it before both have been given back.

Skipped where there is no GPU. `--log-cli-level INFO` shows what was measured.
"""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from tests.serving import WAIT_S, Server
from tests.test_ending import when_readable
from tests.test_failures import Grpc, Http, in_flight, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MODEL = """
import torch

PINNED = torch.empty(8 << 30, dtype=torch.uint8, pin_memory=True)

class Model(torch.nn.Module):
    def forward(self, ids):
        return {"next": ids + 1}

def build():
    return Model()

def example_inputs():
    return {"ids": torch.zeros(2, 4, dtype=torch.int64)}
"""
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--device", "cuda", model=MODEL)
    with grpc.insecure_channel(server.grpc_address) as server.channel:
        yield server
    assert server.stop() == 0


def test_clients_of_a_killed_backend_are_told_before_its_gpu_has_been_given_back(server):
    assert [way.ask(server, 1).value for way in (Http, Grpc)] == [2, 2]
    backend = server.backend()
    ended_fd = os.pidfd_open(backend.pid)
    backend.suspend()  # so that it holds these when it is killed
    with ThreadPoolExecutor(9) as pool:
        ended = pool.submit(when_readable, ended_fd)
        asked = [pool.submit(way.ask, server, number) for number, way in enumerate((Http, Grpc) * 4)]
        until(lambda: in_flight(server) == len(asked))
        killed_s = time.monotonic()
        backend.kill()
        answers = [future.result(WAIT_S) for future in asked]
        ended_s = ended.result(WAIT_S)
    os.close(ended_fd)
    told_s = max(answer.at_s for answer in answers)
    _log.info("killed: told after %.1f ms, ended after %.1f", *((at_s - killed_s) * 1e3 for at_s in (told_s, ended_s)))
    assert [answer.status for answer in answers] == [Http.gone, Grpc.gone] * 4
    assert all("the backend ended while it held this request" in answer.text for answer in answers)
    assert told_s - killed_s < (ended_s - killed_s) / 2
    server.wait_for("ready again")
    until(server.is_ready)
    assert [way.ask(server, 2).value for way in (Http, Grpc)] == [3, 3]
