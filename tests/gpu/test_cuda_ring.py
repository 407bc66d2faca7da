"""Designs over the ring on a real GPU: slots are registered once, answers are right. Skipped where there is none."""

import threading

import pytest
import torch

from headrace.designs import make_design
from headrace.runtime.device import open_device
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
    pair = RingPair.create(Layout(slots=4, input_bytes=5 * 3 * 32 * 32 * 4, output_bytes=5 * 7 * 4))
    client, endpoint = RingClient(pair), RingEndpoint(pair, device.register)
    server = threading.Thread(target=make_design(config).serve, args=(endpoint, device, lambda: model))
    server.start()
    waiting: dict[int, torch.Tensor] = {}
    for index in range(100):
        batch = torch.randn(5, 3, 32, 32)
        waiting[index] = batch
        client.send(index, batch)
        if len(waiting) == 4:
            _check_one(client, model, waiting)
    while waiting:
        _check_one(client, model, waiting)
    client.close()
    server.join(WAIT_S)
    assert not server.is_alive()
    pair.close()


def _check_one(client, model, waiting):
    response = client.receive(WAIT_S)
    assert response.error is None
    with torch.no_grad():
        expected = model(waiting.pop(response.index).cuda()).cpu()
    torch.testing.assert_close(response.output, expected, rtol=1e-3, atol=1e-3)
