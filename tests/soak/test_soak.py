"""Many small requests through a ring and the lanes on the host: none lost, none wrong, nothing leaked, memory flat.

`make test` sends some thousands; `make soak` a million (SOAK_REQUESTS).
"""

import gc
import multiprocessing
import os
import random

import numpy as np
import psutil
import pytest
import torch

from headrace.config import LanesConfig
from headrace.designs.lanes import LanesDesign
from headrace.runtime.device import HostDevice
from headrace.tensors import TensorSpec
from headrace.transport.descriptors import ANSWER, REQUEST, Descriptor, pack, unpack
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "20000"))
ROWS = 256
WAIT_S = 60
LAYOUT = Layout(
    rows=ROWS,
    inputs=(TensorSpec(name="input", dtype="float32", features=(8,)),),
    outputs=(TensorSpec(name="output", dtype="float32", features=(4,)),),
)


class Affine(torch.nn.Module):
    """Exact in float32 for small whole numbers, so that every answer can be told from its neighbour's."""

    def forward(self, inputs):
        return inputs[:, :4] * 2 + inputs[:, 4:]


def serve(pair):
    torch.set_num_threads(1)
    endpoint = RingEndpoint(pair, lambda memory: lambda: None)
    design = LanesDesign(
        num_lanes=2,
        config=LanesConfig(buckets=(1, 4, 16), spin=False),
        compile=False,
        precision="float32",
        normalise=None,
        keep=None,
        mark=lambda name: None,
        report=[],
    )
    design.serve(endpoint, HostDevice(), Affine)
    endpoint.close()


class Client:
    """Keeps the ring as full as it gets with requests of 1 to 8 rows, and checks each answer against its own rows."""

    def __init__(self, pair):
        self.ring = RingClient(pair)
        self.inputs = self.ring.table.inputs[0].numpy()
        self.outputs = self.ring.table.outputs[0].numpy()
        self.random = random.Random(0)  # noqa: S311
        self.waiting: dict[int, int] = {}  # rows of each request that is not answered yet
        self.wrong = 0

    def send_some(self, index, last):
        told = []
        while index < last:
            rows = self.random.randint(1, 8)
            first = self.ring.lease(rows)
            if first is None:
                break
            values = (index * 31 + np.arange(rows * 8)) % 1_000_003
            self.inputs[first : first + rows] = values.reshape(rows, 8)
            self.waiting[index] = rows
            told.append(pack(Descriptor(index, REQUEST, first, rows)))
            index += 1
        if told:
            self.ring.send(b"".join(told))
        return index

    def receive_some(self):
        answers = list(unpack(self.ring.take(WAIT_S)))
        assert answers, f"no answer for {WAIT_S} s"
        for answer in answers:
            rows = self.waiting.pop(answer.request)  # a KeyError is an answer that came twice
            assert (answer.kind, answer.rows) == (ANSWER, rows)
            place = slice(answer.first_row, answer.first_row + rows)
            values = ((answer.request * 31 + np.arange(rows * 8)) % 1_000_003).reshape(rows, 8).astype(np.float32)
            self.wrong += not np.array_equal(self.outputs[place], values[:, :4] * 2 + values[:, 4:])
            self.ring.release(answer.first_row, rows)
        return len(answers)


@pytest.mark.timeout(1800)
def test_a_long_stream_of_small_requests_is_answered_rightly_and_leaves_nothing_behind():
    pair = RingPair.create(LAYOUT)
    backend = multiprocessing.get_context("spawn").Process(target=serve, args=(pair,), daemon=True)
    backend.start()
    client = Client(pair)
    sent = answered = 0
    early_bytes = 0
    while answered < REQUESTS:
        sent = client.send_some(sent, REQUESTS)
        answered += client.receive_some()
        if not early_bytes and answered > REQUESTS // 4:
            gc.collect()
            early_bytes = memory_of(backend.pid) + memory_of(os.getpid())
    late_bytes = memory_of(backend.pid) + memory_of(os.getpid())
    assert client.wrong == 0
    assert not client.waiting
    assert client.ring.lease(ROWS) == 0, "every row came back"
    client.ring.close()
    backend.join(WAIT_S)
    assert backend.exitcode == 0
    pair.close()
    # A leak of 10 bytes a request would be 7.5 MB of a million's last three quarters.
    assert late_bytes - early_bytes < max(4 << 20, 8 * REQUESTS), "memory stayed flat"


def memory_of(pid):
    """Return a process's own memory; shared pages, as the ring's, are no leak of it."""
    return psutil.Process(pid).memory_full_info().uss
