"""Designs over the ring on a real GPU: slots are registered once, answers are right. Skipped where there is none."""

import threading

import pytest
import torch

from headrace.bench.senders import CopyingSender
from headrace.designs import make_published_design
from headrace.runtime.device import open_device
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint
from tests.designs.test_designs import DESIGNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WAIT_S = 60


@pytest.mark.parametrize("config", DESIGNS.values(), ids=DESIGNS.keys())
def test_answers_over_registered_memory_are_the_eager_models(config):
    device = open_device("cuda")
    device.start()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 7)).cuda()
    pair = RingPair.create(
        Layout(
            rows=20,
            inputs=(TensorSpec(name="input", dtype="float32", features=(3, 32, 32)),),
            outputs=(TensorSpec(name="output", dtype="float32", features=(7,)),),
        )
    )
    batches = [torch.randn(5, 3, 32, 32) for _ in range(100)]
    sender, endpoint = CopyingSender(RingClient(pair), batches), RingEndpoint(pair, device.register)
    server = threading.Thread(target=make_published_design(config).serve, args=(endpoint, device, lambda: model))
    server.start()
    waiting = 0
    for index in range(100):
        assert sender.send([index]) == (index,)
        waiting += 1
        if waiting == 4:
            waiting -= _check_some(sender, model, batches)
    while waiting:
        waiting -= _check_some(sender, model, batches)
    sender.close()
    server.join(WAIT_S)
    assert not server.is_alive()
    endpoint.close()
    pair.close()


def _check_some(sender, model, batches):
    received = sender.receive(WAIT_S)
    assert received.first_error is None
    for index, output in zip(received.descriptors["request"], received.outputs, strict=True):
        with torch.no_grad():
            expected = model(batches[index].cuda()).cpu()
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-3)
    return len(received.outputs)
