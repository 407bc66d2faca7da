"""Batches cross real processes, by value, each time anew."""

import multiprocessing

import pytest
import torch

from headrace.request import Request, Response, Timeline
from headrace.transport.pair import QueuePair
from headrace.transport.queue import FreshCopy, QueueClient, QueueEndpoint, SharedAnswer

WAIT_S = 60


def double_everything(queues):
    """The backend of these tests; fails requests whose first value is negative."""
    torch.set_num_threads(1)
    endpoint = QueueEndpoint(queues)
    for request in endpoint.requests():
        if request.inputs.flatten()[0] < 0:
            endpoint.fail(request, ValueError("negative\nsecond line"))
        else:
            endpoint.respond(request, request.inputs * 2)


@pytest.fixture(scope="module")
def client():
    context = multiprocessing.get_context("spawn")
    queues = QueuePair(context.Queue(), context.Queue())
    process = context.Process(target=double_everything, args=(queues,), daemon=True)
    process.start()
    yield QueueClient(queues)
    QueueClient(queues).close()
    process.join(WAIT_S)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "batch",
    [torch.rand(1, 3, 5, 5), torch.rand(7, 2), torch.arange(6, dtype=torch.uint8).reshape(2, 3)],
    ids=["one image", "seven rows", "bytes"],
)
def test_a_batch_comes_back_changed_by_the_backend_alone(client, batch):
    before = batch.clone()
    client.send(5, batch)
    response = client.receive(WAIT_S)
    assert response.index == 5
    assert response.error is None
    torch.testing.assert_close(response.output, before * 2)
    assert 0 < response.timeline.received_ns <= response.timeline.responded_ns
    torch.testing.assert_close(batch, before)


def test_the_same_batch_is_copied_for_every_request(client):
    batch = torch.ones(2, 2)
    client.send(0, batch)
    client.receive(WAIT_S)
    assert not batch.is_shared(), "the sender's memory must stay private, or the second sending would be free"


def test_an_error_comes_back_as_its_first_line(client):
    client.send(1, -torch.ones(1, 1))
    response = client.receive(WAIT_S)
    assert (response.index, response.output, response.error) == (1, None, "ValueError: negative")


def test_receive_gives_up_after_its_time(client):
    assert client.receive(0.01) is None


def test_a_fresh_copy_keeps_shape_and_type_of_a_view():
    source = torch.arange(24, dtype=torch.float32).reshape(4, 6)[1:3]
    rebuild, (copy,) = FreshCopy(source).__reduce__()
    assert copy.is_shared()
    torch.testing.assert_close(rebuild(copy), source)


class Uncopyable(torch.Tensor):
    """Cannot be copied from, nor moved into shared memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.copy_, torch.Tensor.share_memory_):
            raise RuntimeError("no shared memory left")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_batch_that_cannot_be_shared_is_answered_with_the_error(client):
    client.send(3, torch.ones(2, 2).as_subclass(Uncopyable))
    response = client.receive(WAIT_S)
    assert (response.index, response.error) == (3, "TransportFailed: RuntimeError: no shared memory left")


def test_an_answer_that_cannot_be_shared_becomes_an_error():
    answer = SharedAnswer(Response(4, Timeline(), output=torch.ones(2, 2).as_subclass(Uncopyable)))
    rebuild, (response,) = answer.__reduce__()
    assert rebuild(response) == Response(4, Timeline(), error="RuntimeError: no shared memory left")


def test_requests_end_when_the_client_closes():
    context = multiprocessing.get_context("spawn")
    queues = QueuePair(context.Queue(), context.Queue())
    client = QueueClient(queues)
    client.send(0, torch.ones(1, 1))
    client.close()
    received = list(QueueEndpoint(queues).requests())
    assert [request.index for request in received] == [0]
    assert isinstance(received[0], Request)
