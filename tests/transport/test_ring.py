"""The ring across real processes: right data, rows used again, nothing lost, limits and deaths told."""

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from mmap import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import (
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    PeerGone,
    TransportFailed,
)
from headrace.request import DEFAULT_PRIORITY, Ticket, Withdrawal
from headrace.tensors import TensorSpec
from headrace.transport.descriptors import (
    ANSWER,
    CANCEL,
    ERROR,
    REQUEST,
    Descriptor,
    ErrorKind,
    cancellation,
    pack,
    request,
    unpack,
)
from headrace.transport.layout import LINE, PAGE, Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint

WAIT_S = 60
LONGER_S = 2 * WAIT_S  # of a call that something else must end first
FEATURES = 4
ROWS = 6
MISSHAPE = 0.5  # a request that begins with it is answered in another shape
REQUESTS, RESPONSES = range(2)


def layout_of(rows=ROWS, dtype="float32"):
    spec = TensorSpec(name="tensor", dtype=dtype, features=(FEATURES,))
    return Layout(rows=rows, inputs=(spec,), outputs=(spec,))


def no_device(memory):
    return lambda: None


@pytest.fixture
def pair():
    pair = RingPair.create(layout_of())
    yield pair
    pair.close()


class Client:
    """Sends batches as the load generator does, and keeps nothing but what it is told."""

    def __init__(self, pair):
        self.ring = RingClient(pair)
        self.left_over = []  # answers that came together with another one

    def send(self, index, batch):
        first = self.ring.lease(len(batch))
        assert first is not None
        self.ring.table.inputs[0][first : first + len(batch)].copy_(batch)
        self.ring.send(pack(Descriptor(index, REQUEST, first, len(batch))))

    def receive(self):
        """Return the next answer and its output, a copy, or its error."""
        if not self.left_over:
            self.left_over = list(unpack(self.ring.take(WAIT_S)))
        told = self.left_over.pop(0)
        if told.kind == ERROR:
            result = self.ring.error_text(told.entry)
        else:
            result = self.ring.table.outputs[0][told.first_row : told.first_row + told.rows].clone()
        self.ring.release(told.first_row, told.rows)
        return told, result


def serve(pair):
    """The backend of these tests: doubles everything; fails what begins with a negative value, or misshapes it."""
    torch.set_num_threads(1)
    registered, unregistered = [], []

    def register(memory):
        registered.append(memory)
        return lambda: unregistered.append(memory)

    endpoint = RingEndpoint(pair, register)
    assert registered[0].data_ptr() % PAGE == 0
    for asked in endpoint.requests():
        first = asked.inputs[0, 0].item()
        if first < 0:
            endpoint.fail(asked, ValueError("negative\nsecond line"))
        elif first == MISSHAPE:
            endpoint.respond(asked, torch.zeros(1, 1000))
        else:
            endpoint.respond(asked, asked.inputs * 2)
    endpoint.close()
    assert len(registered) == len(unregistered) == 1


@pytest.fixture(scope="module")
def client():
    pair = RingPair.create(layout_of())
    process = start(serve, pair)
    client = Client(pair)
    yield client
    client.ring.close()
    process.join(WAIT_S)
    assert process.exitcode == 0
    pair.close()


def start(target, *args):
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize(
    "batch",
    [
        torch.rand(1, FEATURES),
        torch.rand(ROWS, FEATURES),
        torch.arange(3 * FEATURES, dtype=torch.float32).reshape(FEATURES, 3).T,
        torch.arange(2 * FEATURES).reshape(2, FEATURES),
    ],
    ids=["one row", "all rows", "not contiguous", "of another type"],
)
def test_a_batch_comes_back_changed_by_the_backend_alone(client, batch):
    client.send(9, batch)
    told, output = client.receive()
    assert (told.request, told.kind, told.rows) == (9, ANSWER, len(batch))
    torch.testing.assert_close(output, (batch * 2).float())
    assert 0 < told.received_ns <= told.responded_ns


def test_rows_are_used_again_and_answers_stay_whole(client):
    kept = []
    for number in range(200):
        client.send(number, torch.full((2, FEATURES), float(number)))
        if number % 3 == 2:
            kept += [client.receive() for _ in range(3)]
    kept += [client.receive() for _ in range(200 - len(kept))]
    assert [told.request for told, _ in kept] == list(range(200))
    assert all((output == 2 * told.request).all() for told, output in kept)


def test_many_requests_under_load_lose_nothing(client):
    """Long enough for the counters to pass several powers of 256, with both sides falling asleep and being woken."""
    total, sent = 20_000, 0
    for received in range(total):
        while sent < min(total, received + ROWS):
            client.send(sent, torch.full((1, FEATURES), float(sent)))
            sent += 1
        told, output = client.receive()
        assert (told.request, told.kind) == (received, ANSWER)
        assert output.tolist() == [[2 * received] * FEATURES]


def test_an_error_comes_back_as_its_first_line(client):
    client.send(1, -torch.ones(2, FEATURES))
    assert client.receive()[1] == "ValueError: negative"


def test_errors_of_requests_that_wait_together_are_kept_apart(client):
    client.send(1, -torch.ones(1, FEATURES))
    client.send(2, torch.full((1, FEATURES), MISSHAPE))
    client.send(3, torch.ones(1, FEATURES))
    (_, first), (_, second), (_, third) = (client.receive() for _ in range(3))
    assert first == "ValueError: negative"
    assert second.startswith("TransportFailed: ")
    assert third.tolist() == [[2.0] * FEATURES]


def test_an_answer_of_another_shape_comes_back_as_an_error(client):
    client.send(2, torch.full((1, FEATURES), MISSHAPE))
    told, error = client.receive()
    assert (told.request, told.kind) == (2, ERROR)
    assert "the answer has shape [1, 1000], and the ring was made for [1, 4]" in error


def test_take_gives_up_after_its_time(client):
    assert client.ring.take(0.01) == b""


def test_a_full_table_gives_no_rows_until_some_are_given_back(pair):
    client = RingClient(pair)
    assert [client.lease(4), client.lease(2)] == [0, 4]
    assert client.lease(1) is None
    client.release(0, 4)
    assert client.lease(4) == 0


def test_tickets_are_answered_together_with_what_is_known_of_them(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(pack(Descriptor(5, REQUEST, 0, 2)) + pack(Descriptor(6, REQUEST, 2, 1)))
    taken = endpoint.take(0)
    assert [(told.index, told.first_row, told.rows) for told in taken] == [(5, 0, 2), (6, 2, 1)]
    times = {"received_ns": 10, "started_ns": 20, "computed_ns": 30, "lane": 3, "batch_rows": 7}
    good, bad = (Ticket(endpoint, told.index, told.first_row, told.rows, **times) for told in taken)
    bad.error = ValueError("bad row\nsecond line")
    endpoint.finish([good, bad])
    answer, error = unpack(client.take(0))
    assert (answer.request, answer.kind, answer.first_row, answer.rows) == (5, ANSWER, 0, 2)
    assert (answer.lane, answer.batch_rows, answer.received_ns, answer.started_ns, answer.computed_ns) == (
        3,
        7,
        10,
        20,
        30,
    )
    assert answer.responded_ns > 0
    assert (error.request, error.kind, error.first_row, error.rows) == (6, ERROR, 2, 1)
    assert client.error_text(error.entry) == "ValueError: bad row"


def test_a_long_error_is_cut_and_its_neighbours_stay_whole(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    errors = {2: ValueError("short"), 1: ValueError("ä" * 200), 0: ValueError("ä" * 200)}
    endpoint.finish([Ticket(endpoint, row, row, 1, 0, error=error) for row, error in errors.items()])
    short, first, second = (client.error_text(told.entry) for told in unpack(client.take(0)))
    assert short == "ValueError: short"
    assert first == second
    assert first.startswith("ValueError: ääääääää")


def test_an_error_with_the_name_of_an_undecodable_file_is_told(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    error = FileNotFoundError(os.fsdecode(b"no file \xff.png"))
    endpoint.finish([Ticket(endpoint, 0, 0, 1, 0, error=error)])
    (told,) = unpack(client.take(0))
    assert client.error_text(told.entry).startswith("FileNotFoundError: no file ")


def told_to(client):
    """What the client is told: number, rows and kind of each, errors with their own."""
    return [
        (told.request, told.first_row, told.rows, told.error_kind if told.kind == ERROR else None)
        for told in unpack(client.take(0))
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("bad"), ErrorKind.MODEL),
        (DeadlineExceeded("late"), ErrorKind.DEADLINE),
        (EngineStopped("lost"), ErrorKind.STOPPED),
        (InvalidRequest("no"), ErrorKind.INVALID),
    ],
    ids=["model", "deadline", "stopped", "invalid"],
)
def test_an_error_crosses_with_its_kind_and_its_text(pair, error, kind):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    endpoint.finish([Ticket(endpoint, 1, 4, 2, 0, error=error)])
    (told,) = unpack(client.take(0))
    assert (told.kind, told.error_kind) == (ERROR, kind)
    assert client.error_text(told.entry) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("sent", "taken"),
    [((0, 0), (0, DEFAULT_PRIORITY)), ((5, 7), (5, 7)), ((-5, -7), (0, DEFAULT_PRIORITY))],
    ids=["none", "both", "negative ones are none"],
)
def test_a_request_has_the_deadline_and_the_priority_that_it_was_sent_with(pair, sent, taken):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(request(1, 0, 1, *sent))
    assert [(ticket.deadline_ns, ticket.priority) for ticket in endpoint.take(0)] == [taken]


def test_a_request_that_its_cancellation_has_overtaken_is_answered_at_once(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(request(1, 0, 2) + request(2, 2, 1) + cancellation(1, 0, 2))
    assert [ticket.index for ticket in endpoint.take(0)] == [2]
    assert told_to(client) == [(1, 0, 2, ErrorKind.CANCELLED)]
    assert endpoint.withdrawn() == ()
    assert endpoint.open_requests == 1


def test_the_cancellation_of_what_was_taken_before_is_handed_on_once(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(request(1, 0, 2) + request(2, 2, 1))
    endpoint.take(0)
    client.send(cancellation(2, 2, 1) + request(2, 2, 1))  # the new one of the same number is wanted
    assert [ticket.index for ticket in endpoint.take(0)] == [2]
    assert endpoint.withdrawn() == [Withdrawal(endpoint, (2, 2))]
    assert endpoint.withdrawn() == ()
    assert endpoint.open_requests == 3


@pytest.mark.parametrize(
    "broken",
    [
        Descriptor(9, REQUEST, 0, 0),
        Descriptor(9, REQUEST, 0, -1),
        Descriptor(9, REQUEST, -1, 2),
        Descriptor(9, REQUEST, ROWS - 1, 2),
        Descriptor(9, REQUEST, 0, 2**31 - 1),
        Descriptor(9, ANSWER, 0, 1),
        Descriptor(9, 77, 0, 1),
    ],
    ids=["no rows", "fewer", "before the table", "across its end", "too many", "an answer", "an unknown kind"],
)
def test_a_descriptor_that_cannot_be_is_refused_and_the_others_are_taken(pair, broken):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(request(1, 0, 1) + pack(broken) + request(2, 1, 1))
    assert [ticket.index for ticket in endpoint.take(0)] == [1, 2]
    assert told_to(client) == [(9, broken.first_row, broken.rows, ErrorKind.INVALID)]
    assert endpoint.open_requests == 2


def test_cancelling_what_was_never_sent_harms_nobody(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(pack(Descriptor(9, CANCEL, -1, -1)) + request(1, 0, 1))
    assert [ticket.index for ticket in endpoint.take(0)] == [1]
    assert endpoint.withdrawn() == [Withdrawal(endpoint, (9, -1))]
    assert told_to(client) == []


def test_a_published_design_computes_what_was_cancelled(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(request(1, 0, 1))
    requests = endpoint.requests()
    assert next(requests).index == 1
    client.send(cancellation(1, 0, 1) + request(2, 1, 1))
    client.close()
    assert [each.index for each in requests] == [2]


def test_the_ring_of_requests_has_room_for_the_most_that_can_be_unread(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(b"".join(request(row, row, 1) for row in range(ROWS)))
    endpoint.finish(endpoint.take(0))
    client.send(b"".join(cancellation(row, row, 1) for row in range(ROWS)))
    assert len(told_to(client)) == ROWS
    client.send(b"".join(request(ROWS + row, row, 1) + cancellation(ROWS + row, row, 1) for row in range(ROWS)))
    client.close()
    with pytest.raises(TransportFailed, match=f"the ring is full: {3 * ROWS + 1} descriptors"):
        client.send(cancellation(0, 0, 1))
    assert endpoint.take(0) == []
    assert endpoint.closed
    assert told_to(client) == [(ROWS + row, row, 1, ErrorKind.CANCELLED) for row in range(ROWS)]


@given(st.lists(st.sampled_from(["send", "cancel", "read", "take", "answer"]), max_size=120))
def test_a_client_that_keeps_the_rules_never_finds_the_ring_full(steps):
    pair = RingPair.create(layout_of(rows=2))
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    unanswered, uncancelled, taken, numbers, ended = {}, [], [], 0, []

    def read():
        for told in unpack(client.take(0)):
            assert unanswered.pop(told.request) == told.first_row
            ended.append(told.request)
            client.release(told.first_row, 1)

    for step in steps:
        if step == "send" and (row := client.lease(1)) is not None:
            client.send(request(numbers, row, 1))
            unanswered[numbers] = row
            uncancelled.append(numbers)
            numbers += 1
        elif step == "cancel" and uncancelled:
            number = uncancelled.pop()
            if number in unanswered:
                client.send(cancellation(number, unanswered[number], 1))
        elif step == "read":
            read()
        elif step == "take" and endpoint.ready():
            taken += endpoint.take(0)
        elif step == "answer":
            endpoint.finish(taken)
            taken.clear()
    client.close()
    endpoint.finish([*taken, *endpoint.take(0)])
    read()
    assert sorted(ended) == list(range(numbers)), "each is answered once"
    assert endpoint.open_requests == 0
    pair.close()


@pytest.mark.parametrize("dtype", ["float32", "int64", "bfloat16", "bool"])
def test_both_sides_see_the_same_rows_of_every_type(dtype):
    pair = RingPair.create(layout_of(dtype=dtype))
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.table.inputs[0].copy_(torch.arange(ROWS * FEATURES).reshape(ROWS, FEATURES))
    assert endpoint.table.inputs[0].equal(client.table.inputs[0])
    endpoint.table.outputs[0][2:4] = 1
    assert client.table.outputs[0].float().sum(1).tolist() == [0, 0, FEATURES, FEATURES, 0, 0]
    pair.close()


def test_what_the_client_sent_before_it_closed_is_taken_and_then_no_more(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(pack(Descriptor(5, REQUEST, 0, 2)))
    client.close()
    assert [told.index for told in endpoint.take(0)] == [5]
    assert endpoint.take(LONGER_S) is None
    assert list(endpoint.requests()) == []


def test_a_full_table_of_single_rows_can_be_sent_answered_and_closed(pair):
    client, endpoint = RingClient(pair), RingEndpoint(pair, no_device)
    client.send(b"".join(pack(Descriptor(row, REQUEST, row, 1)) for row in range(ROWS)))
    client.close()
    taken = endpoint.take(0)
    endpoint.finish([Ticket(endpoint, told.index, told.first_row, told.rows, 0) for told in taken])
    assert [told.request for told in unpack(client.take(0))] == list(range(ROWS))


def wait_until_asleep(pair, direction):
    """Wait until the reader of a direction has said that it sleeps."""
    memory = mmap(pair.memory_fd, pair.layout.total_bytes)
    at = pair.layout.ring_offset(direction) + 2 * LINE
    while not memory[at]:
        pass


def both_sides(as_backend, as_client):
    """Be the backend of one ring and the client of another; answer and ask once, then wait to be killed."""
    endpoint, client = RingEndpoint(as_backend, no_device), RingClient(as_client)
    client.send(pack(Descriptor(1, REQUEST, 0, 1)))
    for told in endpoint.take(WAIT_S):
        endpoint.finish([Ticket(endpoint, told.index, told.first_row, told.rows, 0)])
    signal.pause()


def test_whoever_waits_for_a_process_that_is_killed_is_woken_at_once():
    to_backend, to_client = (RingPair.create(layout_of()) for _ in range(2))
    client, endpoint = RingClient(to_backend), RingEndpoint(to_client, no_device)
    process = start(both_sides, to_backend, to_client)
    client.send(pack(Descriptor(7, REQUEST, 3, 2)))
    assert [told.request for told in unpack(client.take(WAIT_S))] == [7]
    assert [told.index for told in endpoint.take(WAIT_S)] == [1]
    with ThreadPoolExecutor(2) as waiting:
        answers = waiting.submit(client.take, LONGER_S)
        requests = waiting.submit(endpoint.take, LONGER_S)
        wait_until_asleep(to_backend, RESPONSES)
        wait_until_asleep(to_client, REQUESTS)
        os.kill(process.pid, signal.SIGKILL)
        assert isinstance(answers.exception(WAIT_S), PeerGone)
        assert requests.result(WAIT_S) is None
    with pytest.raises(PeerGone):
        client.take(LONGER_S)
    process.join(WAIT_S)
    for each in (to_backend, to_client):
        each.close()


def answers_asks_and_dies(as_backend, as_client):
    endpoint, client = RingEndpoint(as_backend, no_device), RingClient(as_client)
    for told in endpoint.take(WAIT_S):
        endpoint.finish([Ticket(endpoint, told.index, told.first_row, told.rows, 0)])
    client.send(pack(Descriptor(1, REQUEST, 0, 1)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_process_sent_before_it_died_is_read_and_then_its_end_is_told():
    to_backend, to_client = (RingPair.create(layout_of()) for _ in range(2))
    client, endpoint = RingClient(to_backend), RingEndpoint(to_client, no_device)
    client.send(pack(Descriptor(7, REQUEST, 3, 2)))
    process = start(answers_asks_and_dies, to_backend, to_client)
    process.join(WAIT_S)
    assert process.exitcode == -signal.SIGKILL
    assert [told.request for told in unpack(client.take(LONGER_S))] == [7]
    with pytest.raises(PeerGone):
        client.take(LONGER_S)
    assert [request.index for request in endpoint.requests()] == [1], "and a design's loop ends"
    for each in (to_backend, to_client):
        each.close()


def test_a_side_leaves_no_descriptor_behind(pair):
    process = start(signal.pause)
    client = RingClient(pair)
    with mmap(pair.memory_fd, pair.layout.total_bytes) as header:
        header[8:16] = process.pid.to_bytes(8, "little")  # as that process would
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert client.take(0) == b""
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208  it watches the process
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    process.kill()
    process.join(WAIT_S)


def test_the_memory_has_no_name_and_cannot_shrink(pair):
    assert "headrace" not in " ".join(os.listdir("/dev/shm"))  # noqa: PTH208, S108
    with pytest.raises(PermissionError):
        os.ftruncate(pair.memory_fd, 10)


def test_a_ring_larger_than_memory_is_refused():
    with pytest.raises(TransportFailed, match="lower --ring-slots or --batch-size"):
        RingPair.create(layout_of(rows=10**13))


@pytest.mark.parametrize("first", [0, 1], ids=["that it has ended", "that it begins to end"])
def test_a_client_hears_of_the_backends_end_by_what_tells_it_first(pair, first):
    pipes = [os.pipe(), os.pipe()]
    client = RingClient(replace(pair, peer_fd=pipes[0][0], ending_fd=pipes[1][0]))
    assert client.take(0) == b""
    os.close(pipes[first][1])
    with pytest.raises(PeerGone):
        client.take(LONGER_S)
    during = os.listdir("/proc/self/fd")  # noqa: PTH208
    client.close()
    assert len(os.listdir("/proc/self/fd")) == len(during) - 1  # noqa: PTH208
    for descriptor in (pipes[0][0], pipes[1][0], pipes[1 - first][1]):
        os.close(descriptor)
