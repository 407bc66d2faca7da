"""The designs on a real GPU: right answers under load, through real streams. Skipped where there is none."""

import pytest
import torch

from headrace.config import DesignConfig
from headrace.designs import make_published_design
from headrace.runtime.device import open_device
from tests.designs.test_designs import DESIGNS, ListEndpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def model_and_batches(count, rows):
    generator = torch.Generator().manual_seed(2)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(8)
    ).cuda()
    batches = [torch.randn(rows, 3, 64, 64, generator=generator) for _ in range(count)]
    with torch.no_grad():
        expected = [model(batch.cuda()).cpu() for batch in batches]
    return model, batches, expected


@pytest.mark.parametrize("config", DESIGNS.values(), ids=DESIGNS.keys())
@pytest.mark.parametrize("rows", [1, 17], ids=["one row", "seventeen rows"])
def test_every_answer_is_the_eager_models(config, rows):
    model, batches, expected = model_and_batches(200, rows)
    device = open_device("cuda")
    device.start()
    endpoint = ListEndpoint(batches)
    make_published_design(config).serve(endpoint, device, lambda: model)
    assert endpoint.errors == {}
    assert sorted(endpoint.outputs) == list(range(200))
    for index, reference in enumerate(expected):
        assert endpoint.outputs[index].device.type == "cpu"
        error = (endpoint.outputs[index] - reference).norm() / reference.norm()
        assert error < 5e-3, f"request {index} is off by {error:.1e}"


def test_an_exception_on_the_device_answers_its_request_and_no_other():
    model, batches, _ = model_and_batches(6, 2)
    batches[3] = torch.randn(2, 3, 65, 64)  # the linear layer's size does not fit
    device = open_device("cuda")
    device.start()
    endpoint = ListEndpoint(batches)
    make_published_design(DesignConfig(num_workers=2)).serve(endpoint, device, lambda: model)
    assert sorted(endpoint.errors) == [3]
    assert sorted(endpoint.outputs) == [0, 1, 2, 4, 5]
