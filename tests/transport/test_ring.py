"""The ring across real processes: right data, slots used again, nothing lost, limits told."""

import multiprocessing
import os
import select
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import TransportFailed
from headrace.transport.descriptors import ANSWER, REQUEST, Descriptor, DescriptorRing, require_ordered_memory
from headrace.transport.layout import DESCRIPTOR, PAGE, Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint

WAIT_S = 60
LAYOUT = Layout(slots=3, input_bytes=4096, output_bytes=256)


@given(slots=st.integers(1, 50), input_bytes=st.integers(1, 50_000), output_bytes=st.integers(1, 50_000))
def test_no_two_parts_of_the_memory_overlap(slots, input_bytes, output_bytes):
    layout = Layout(slots=slots, input_bytes=input_bytes, output_bytes=output_bytes)
    parts = [(layout.ring_offset(direction), layout.ring_bytes) for direction in (0, 1)]
    for slot in range(slots):
        assert layout.input_offset(slot) % PAGE == 0
        parts += [(layout.input_offset(slot), input_bytes), (layout.output_offset(slot), output_bytes)]
    ends = [begin + size for begin, size in parts]
    assert all(end <= begin for end, (begin, _) in zip(ends, parts[1:], strict=False))
    assert ends[-1] <= layout.total_bytes


@pytest.fixture
def pair():
    pair = RingPair.create(LAYOUT)
    yield pair
    pair.close()


def ring_of(pair, entries=4):
    return DescriptorRing(mmap(pair.memory_fd, LAYOUT.total_bytes), 0, entries, pair.wake_backend_fd)


def test_descriptors_arrive_in_order_and_whole(pair):
    ring = ring_of(pair)
    sent = [
        Descriptor(2**40 + 7, REQUEST, 2, 5, (3, 1, 224, 224), 1, (1, 2, 3, 2**62)),
        Descriptor(1, ANSWER, 0, 0, (), 0),
    ]
    for descriptor in sent:
        ring.put(descriptor)
    assert [ring.take(0), ring.take(0)] == sent
    assert ring.take(0) is None


@given(st.lists(st.booleans(), max_size=60))
def test_a_ring_is_a_bounded_queue(steps):
    """Whatever the order of puts (True) and takes, it gives what was put, first in first out, and refuses when full."""
    pair = RingPair.create(LAYOUT)
    ring, waiting = ring_of(pair, entries=4), []
    for number, put in enumerate(steps):
        if put and len(waiting) == 4:
            with pytest.raises(TransportFailed, match="the ring is full"):
                ring.put(Descriptor(number, REQUEST))
        elif put:
            ring.put(Descriptor(number, REQUEST))
            waiting.append(number)
        else:
            taken = ring.take(0)
            assert (taken.index if taken else None) == (waiting.pop(0) if waiting else None)
    pair.close()


def test_a_late_wake_up_is_not_taken_for_work(pair):
    ring = ring_of(pair)
    os.eventfd_write(pair.wake_backend_fd, 1)
    reader = ThreadPoolExecutor(1)
    taken = reader.submit(ring.take, WAIT_S)
    while select.select([pair.wake_backend_fd], [], [], 0)[0]:  # until the reader has drained it
        pass
    ring.put(Descriptor(5, REQUEST))
    assert taken.result(WAIT_S).index == 5
    reader.shutdown()


def test_entries_fit_their_place():
    assert DESCRIPTOR >= 32 + 6 * 8 + 4 * 8


def serve(pair):
    """The backend of these tests: doubles everything; fails what begins with a negative value."""
    torch.set_num_threads(1)
    registered = []
    endpoint = RingEndpoint(pair, registered.append)
    assert registered[0].data_ptr() % PAGE == 0
    for request in endpoint.requests():
        first = request.inputs.flatten()[:1]
        if first.numel() and first.item() < 0:
            endpoint.fail(request, ValueError("negative\nsecond line"))
        elif request.inputs.shape == (1,) and first.item() == 77:
            endpoint.respond(request, torch.zeros(1000))
        else:
            endpoint.respond(request, request.inputs * 2)


@pytest.fixture(scope="module")
def client():
    pair = RingPair.create(LAYOUT)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(pair,), daemon=True)
    process.start()
    client = RingClient(pair)
    yield client
    client.close()
    process.join(WAIT_S)
    assert process.exitcode == 0
    pair.close()


@pytest.mark.parametrize(
    "batch",
    [
        torch.rand(2, 3, 4),
        torch.arange(8, dtype=torch.int64),
        torch.rand(4, 4).to(torch.bfloat16),
        torch.arange(64, dtype=torch.uint8).reshape(8, 8)[:, ::2],
        torch.tensor(3.5),
        torch.zeros(0, 3),
    ],
    ids=["float32", "int64", "bfloat16", "not contiguous", "scalar", "empty"],
)
def test_a_batch_comes_back_changed_by_the_backend_alone(client, batch):
    client.send(9, batch)
    response = client.receive(WAIT_S)
    assert (response.index, response.error) == (9, None)
    assert response.output.dtype == batch.dtype
    torch.testing.assert_close(response.output, batch * 2)
    assert 0 < response.timeline.received_ns <= response.timeline.responded_ns


def test_slots_are_used_again_and_answers_stay_whole(client):
    kept = []
    for number in range(200):
        client.send(number, torch.full((4,), float(number)))
        if number % 3 == 2:
            kept += [client.receive(WAIT_S) for _ in range(3)]
    kept += [client.receive(WAIT_S) for _ in range(200 - len(kept))]
    assert [response.index for response in kept] == list(range(200))
    assert all((response.output == 2 * response.index).all() for response in kept), "answers are copies"


def test_many_requests_under_load_lose_nothing(client):
    """Long enough for the counters to pass several powers of 256, with both sides falling asleep and being woken."""
    total, sent, received = 4000, 0, 0
    while received < total:
        while sent < min(total, received + LAYOUT.slots):
            client.send(sent, torch.full((2,), float(sent)))
            sent += 1
        response = client.receive(WAIT_S)
        assert (response.index, response.error) == (received, None)
        assert response.output.tolist() == [2 * received] * 2
        received += 1


def test_an_error_comes_back_as_its_first_line(client):
    client.send(1, -torch.ones(1))
    assert client.receive(WAIT_S).error == "ValueError: negative"


def test_an_answer_that_does_not_fit_comes_back_as_an_error(client):
    client.send(2, torch.full((1,), 77.0))
    assert "the answer has 4000 bytes, and a slot of this ring holds 256" in client.receive(WAIT_S).error


def test_receive_gives_up_after_its_time(client):
    assert client.receive(0.01) is None


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(1025), "has 4100 bytes, and a slot of this ring holds 4096"),
        (torch.zeros(1, 1, 1, 1, 1, 1, 1), "with 7 dimensions; the ring carries at most 6"),
        (torch.zeros(1, dtype=torch.complex64), "is torch.complex64"),
    ],
    ids=["too large", "too many dimensions", "element type"],
)
def test_what_the_ring_cannot_carry_is_refused_before_it_is_copied(client, batch, words):
    with pytest.raises(TransportFailed, match=words):
        client.send(0, batch)


def test_more_requests_than_slots_are_refused(pair):
    client = RingClient(pair)
    for number in range(3):
        client.send(number, torch.ones(1))
    with pytest.raises(TransportFailed, match="all 3 slots of the ring are in use"):
        client.send(3, torch.ones(1))


def test_the_memory_has_no_name_and_cannot_shrink(pair):
    assert "headrace" not in " ".join(os.listdir("/dev/shm"))  # noqa: PTH208, S108
    with pytest.raises(PermissionError):
        os.ftruncate(pair.memory_fd, 10)


def test_a_ring_larger_than_memory_is_refused():
    with pytest.raises(TransportFailed, match="lower --ring-slots or --batch-size"):
        RingPair.create(Layout(slots=10, input_bytes=10**15, output_bytes=1))


def test_a_processor_that_reorders_stores_is_refused():
    require_ordered_memory("x86_64")
    with pytest.raises(TransportFailed, match="this is aarch64; use --transport queue"):
        require_ordered_memory("aarch64")
