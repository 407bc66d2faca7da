"""Lanes on a real GPU: graphs, gathered batches, all dtypes, models without a graph. Skipped where there is none."""

import threading

import pytest
import torch

from headrace.config import LanesConfig
from headrace.model.signature import FlatModel, signature_of
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder
from headrace.runtime.device import open_device
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WAIT_S = 60


class TwoInputs(torch.nn.Module):
    """Token ids and a mask in, a dictionary of a float and an integer tensor out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(100, 16)
        self.linear = torch.nn.Linear(16, 5)

    def forward(self, ids, mask):
        words = self.embedding(ids) * mask.unsqueeze(-1)
        scores = self.linear(words.sum(1))
        return {"scores": scores, "best": scores.argmax(1)}


class DataDependent(torch.nn.Module):
    """Looks at its input's values on the host, which no graph can."""

    def forward(self, inputs):
        return inputs * 2 if inputs.sum().item() > 0 else inputs * 3


class Served:
    """A model behind lanes, in this process."""

    def __init__(self, model, example, *, compiled=False, buckets=(1, 4, 8), lanes=3, graphs=True):
        self.device = open_device("cuda")
        self.device.start()
        self.model = model.cuda().eval()
        signature = signature_of(self.model, [tensor.cuda() for tensor in example])
        self.source = LocalSource(
            Layout(rows=64, inputs=signature.inputs, outputs=signature.outputs), self.device.register
        )
        self.lanes = LaneBuilder(
            model=FlatModel(self.model, None),
            example=example,
            device=self.device.torch_device,
            num_lanes=lanes,
            compile=compiled,
            config=LanesConfig(buckets=buckets, graphs=graphs),
            mark=lambda name: None,
        ).build()
        self.dispatcher = Dispatcher(self.lanes.lanes, BatchingConfig(buckets=buckets), 3)
        self.dispatcher.start()

    def submit(self, *inputs):
        ticket = self.source.place(inputs, WAIT_S)
        self.dispatcher.submit([ticket])
        return ticket.future

    def expected(self, *inputs):
        with torch.no_grad():
            output = self.model(*(tensor.cuda() for tensor in inputs))
        return list(output.values()) if isinstance(output, dict) else [output]

    def check(self, requests):
        futures = [self.submit(*inputs) for inputs in requests]
        for inputs, future in zip(requests, futures, strict=True):
            for got, wanted in zip(future.result(WAIT_S), self.expected(*inputs), strict=True):
                torch.testing.assert_close(got, wanted.cpu(), rtol=1e-3, atol=1e-3)

    def close(self):
        self.dispatcher.stop()
        self.lanes.close()
        self.source.close()


def images(count, rows):
    return [(torch.randn(rows, 3, 16, 16),) for _ in range(count)]


def convolution():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 7)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_answers_of_all_sizes_are_the_eager_models(compiled):
    served = Served(convolution(), [torch.randn(2, 3, 16, 16)], compiled=compiled)
    assert served.lanes.form == "CUDA graphs"
    served.check([*images(40, 1), *images(20, 4), *images(20, 8), *images(20, 3), *images(30, 1)])
    assert served.lanes.recompiles() == 0
    served.close()


def test_rows_that_do_not_lie_together_are_gathered():
    served = Served(convolution(), [torch.randn(2, 3, 16, 16)], lanes=1)
    held = [served.source.place((torch.randn(1, 3, 16, 16),), WAIT_S) for _ in range(20)]
    for ticket in held[::2]:
        served.source.give_back(ticket)  # leaves holes of one row
    inputs = images(10, 1)
    tickets = [served.source.place(each, WAIT_S) for each in inputs]
    served.dispatcher.submit(tickets)
    for each, ticket in zip(inputs, tickets, strict=True):
        torch.testing.assert_close(
            ticket.future.result(WAIT_S)[0], served.expected(*each)[0].cpu(), rtol=1e-3, atol=1e-3
        )
    assert {ticket.batch_rows for ticket in tickets} != {1}, "some ran together"
    served.close()


def test_several_inputs_and_outputs_of_several_types():
    def request(rows):
        return torch.randint(0, 100, (rows, 9)), torch.rand(rows, 9) > 0.3

    served = Served(TwoInputs(), request(4))
    served.check([request(rows) for rows in (1, 8, 3, 1, 5, 2)])
    served.close()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_that_cannot_be_captured_runs_all_the_same_and_says_why(compiled):
    served = Served(DataDependent(), [torch.ones(2, 4)], compiled=compiled)
    assert served.lanes.form in ("eager", "compiled under a lock")
    assert "cannot be captured" in " ".join(served.lanes.notes)
    served.check([(torch.full((1, 4), 5.0),), (torch.full((8, 4), 2.0),)])
    served.close()


def test_graphs_can_be_switched_off():
    served = Served(convolution(), [torch.randn(2, 3, 16, 16)], graphs=False)
    assert served.lanes.form == "eager"
    served.check([*images(5, 1), *images(5, 7)])
    served.close()


def test_several_threads_may_submit():
    served = Served(convolution(), [torch.randn(2, 3, 16, 16)])
    errors = []

    def work():
        try:
            served.check(images(30, 2))
        except BaseException as error:  # noqa: BLE001  shown below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    served.close()
