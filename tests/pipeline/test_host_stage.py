"""The stage on the host before and behind the dispatcher: every request ends once, whatever happens to it where."""

import threading
from mmap import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import Cancelled, DeadlineExceeded, EngineStopped, InvalidRequest, ModelError
from headrace.model.described import Bytes, Described
from headrace.model.signature import signature_of
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.host_stage import HostStage
from headrace.pipeline.host_steps import host_steps, network_example
from headrace.request import Ticket, Withdrawal
from headrace.transport.layout import Layout
from headrace.transport.table import RowTable
from headrace.wire.elements import cells, fill_cells
from tests.backend.fakes import Lanes
from tests.pipeline.fakes import WAIT_S, FakeArrivals, FakeSource

BUCKETS = (1, 2, 4)
TABLE_ROWS = 5  # of the stage
CLIENT_ROWS = 64
FEATURES = 3  # `Lanes` doubles the first tensor


class Doubled(torch.nn.Module):
    def forward(self, numbers):
        return numbers * 2


class Steps:
    """Texts to numbers and back. What a text says is done: to hold until `go`, or to be wrong in one way or another."""

    def __init__(self):
        self.go = threading.Event()
        self.held = threading.Semaphore(0)  # one more for each row that holds
        self.made = []
        self.threads = set()

    def preprocess(self, text):
        self.made.append(text)
        self.threads.add(torch.get_num_threads())
        if text == b"hold":
            self.held.release()
            assert self.go.wait(WAIT_S)
            text = b"0"
        if text == b"bug":
            raise KeyError("bug")
        if text == b"shape":
            return torch.zeros(FEATURES + 1)
        return torch.full((FEATURES,), float(text))  # ValueError for what is no number

    def postprocess(self, output):
        number = output[0].item()
        if number == 26:
            raise ZeroDivisionError("thirteen")
        return {"text": "long" * 9 if number == 28 else f"{number:g}", "number": output}

    def described(self, *, with_postprocess=True):
        after = {"postprocess": self.postprocess, "outputs": {"text": Bytes(max_bytes=16)}} if with_postprocess else {}
        declared = {"text": Bytes(max_bytes=8)}
        return Described(Doubled(), inputs=declared, preprocess=self.preprocess, example={"text": b"1"}, **after)


class Client(FakeSource):
    """A source with a real table."""

    def __init__(self, steps):
        super().__init__()
        self.specs = steps
        layout = Layout(rows=CLIENT_ROWS, inputs=steps.inputs, outputs=steps.outputs)
        self.table = RowTable(layout, mmap(-1, layout.total_bytes))
        self._next = 0

    def ticket(self, *texts, index=None, within_s=0.0, priority=100):
        first, self._next = self._next, self._next + len(texts)
        rows = self.table.inputs[0][first : self._next].reshape(-1).numpy().data
        fill_cells(rows, texts, self.specs.inputs[0])
        ticket = Ticket(self, first if index is None else index, first, len(texts), now_ns(), priority=priority)
        ticket.deadline_ns = now_ns() + int(within_s * NS_PER_S) if within_s else 0
        return ticket

    def texts(self, ticket):
        rows = self.table.outputs[0][ticket.first_row : ticket.first_row + ticket.rows].reshape(-1).numpy().data
        return [bytes(each) for each in cells(rows, self.specs.outputs[0])]


class Scene:
    """A stage with a client, its arrivals and its lanes in the test's hands."""

    def __init__(self, *, threads=1, with_postprocess=True):
        self.steps = Steps()
        described = self.steps.described(with_postprocess=with_postprocess)
        (example,) = network_example(described)
        specs = host_steps(described, signature_of(described.network, example), [example * 2])
        self.steps.made.clear()
        self.steps.threads.clear()
        self.client = Client(specs)
        self.lanes = Lanes()
        self.registered = []
        dispatcher = Dispatcher([self.lanes], BatchingConfig(buckets=BUCKETS), 1)
        self.stage = HostStage(specs, TABLE_ROWS, dispatcher, self._register, threads)
        self.arrivals = FakeArrivals()
        self._loop = threading.Thread(target=self.stage.answer, args=(self.arrivals,), daemon=True)
        self._loop.start()

    def _register(self, memory):
        self.registered.append(memory.nbytes)
        return self.registered.clear

    def send(self, *tickets):
        self.arrivals.put(list(tickets))
        return tickets

    def hold(self, count=1):
        """Keep so many threads busy; return the requests that do."""
        held = self.send(*(self.client.ticket(b"hold") for _ in range(count)))
        for _ in range(count):
            assert self.steps.held.acquire(timeout=WAIT_S)
        return held

    def end(self):
        """Send no more, and see that all has ended and nothing is kept."""
        self.arrivals.put(None)
        self._loop.join(WAIT_S)
        assert not self._loop.is_alive()
        told = self.client.told
        assert len({id(ticket) for ticket in told}) == len(told), "told twice"
        assert self.stage._leases.free_rows == TABLE_ROWS
        assert not self.stage._begun
        assert not self.registered
        return told


@pytest.mark.parametrize("threads", [1, 3])
def test_requests_of_several_rows_are_answered_with_the_right_rows(threads):
    scene = Scene(threads=threads)
    sent = scene.send(*(scene.client.ticket(*[b"%d" % (20 * number + row) for row in range(rows)])
                        for number, rows in enumerate((1, 4, 2, 3, 4, 1, 2))))  # fmt: skip
    scene.client.wait_until_told(len(sent))
    texts = [[b"%d" % (2 * (20 * number + row)) for row in range(ticket.rows)] for number, ticket in enumerate(sent)]
    for ticket, wanted in zip(sent, texts, strict=True):
        assert (ticket.error, scene.client.texts(ticket)) == (None, wanted)
        numbers = scene.client.table.outputs[1][ticket.first_row : ticket.first_row + ticket.rows]
        assert numbers.tolist() == [[float(text)] * FEATURES for text in wanted]
        assert ticket.received_ns <= ticket.started_ns <= ticket.computed_ns
        assert ticket.batch_rows >= ticket.rows
    scene.end()


def test_without_postprocess_the_networks_outputs_are_the_clients():
    scene = Scene(with_postprocess=False)
    scene.send(scene.client.ticket(b"3", b"4"))
    scene.client.wait_until_told(1)
    assert scene.client.table.outputs[0][:2].tolist() == [[6.0] * FEATURES, [8.0] * FEATURES]
    scene.end()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (b"x", InvalidRequest, "cannot take row 1: ValueError: could not convert"),
        (b"bug", ModelError, "preprocess failed: KeyError"),
        (b"shape", ModelError, r"preprocess gave torch.float32 \[4\] for input_0, and torch.float32 \[3\]"),
        (b"13", ModelError, "postprocess failed: ZeroDivisionError"),
        (b"14", ModelError, "element 0 of tensor text has 36 bytes, and the model takes at most 16"),
    ],
)
def test_what_fails_fails_alone_and_says_why(text, error, words):
    scene = Scene(threads=2)
    scene.lanes.hold()
    before, bad, after = scene.send(
        scene.client.ticket(b"1"), scene.client.ticket(b"2", text), scene.client.ticket(b"3")
    )
    scene.lanes.let_go()
    scene.client.wait_until_told(3)
    with pytest.raises(error, match=words):
        raise bad.error
    assert (before.error, scene.client.texts(before)) == (None, [b"2"])
    assert (after.error, scene.client.texts(after)) == (None, [b"6"])
    scene.end()


def test_a_request_larger_than_a_batch_is_refused():
    scene = Scene()
    (large,) = scene.send(scene.client.ticket(*[b"1"] * 5))
    scene.client.wait_until_told(1)
    with pytest.raises(InvalidRequest, match="the request has 5 rows, and a batch at most 4; split it"):
        raise large.error
    assert not scene.steps.made
    scene.end()


def test_a_spoilt_length_in_a_clients_memory_fails_that_request_alone():
    scene = Scene()
    ticket = scene.client.ticket(b"1")
    scene.client.table.inputs[0][ticket.first_row, :4] = 255
    scene.send(ticket)
    scene.client.wait_until_told(1)
    with pytest.raises(InvalidRequest, match="has 4294967295 bytes, and the model takes at most 8"):
        raise ticket.error
    scene.end()


def test_what_is_too_late_is_told_while_all_threads_are_busy():
    scene = Scene()
    (held,) = scene.hold()
    (late,) = scene.send(scene.client.ticket(b"1", within_s=0.01))
    scene.client.wait_until_told(1)
    assert scene.client.told == [late]
    assert isinstance(late.error, DeadlineExceeded)
    scene.steps.go.set()
    assert scene.end() == [late, held]
    assert scene.steps.made == [b"hold"]


def test_what_becomes_late_while_it_is_made_is_not_computed():
    scene = Scene()
    ticket = scene.client.ticket(b"hold", b"1", within_s=WAIT_S)
    scene.send(ticket)
    assert scene.steps.held.acquire(timeout=WAIT_S)
    (begun,) = scene.stage._begun
    begun.deadline_ns = 1
    scene.steps.go.set()
    scene.client.wait_until_told(1)
    assert isinstance(ticket.error, DeadlineExceeded)
    assert scene.steps.made == [b"hold"]
    assert not scene.lanes.launched
    scene.end()


def withdrawal_of(ticket):
    return Withdrawal(ticket.source, (ticket.index, ticket.first_row))


@pytest.mark.parametrize("whole_client", [False, True], ids=["one request", "a client that is gone"])
def test_what_is_withdrawn_is_dropped_wherever_it_is(whole_client):
    scene = Scene(threads=1)
    scene.lanes.hold()
    other = Client(scene.client.specs)
    (computing,) = scene.send(other.ticket(b"5"))
    scene.lanes.wait_until_launched([0])
    with_dispatcher, making, waiting = (
        scene.client.ticket(b"6"), scene.client.ticket(b"hold", b"7"), scene.client.ticket(b"8"))  # fmt: skip
    scene.send(with_dispatcher, making, waiting)
    assert scene.steps.held.acquire(timeout=WAIT_S)
    gone = (with_dispatcher, making, waiting)
    scene.arrivals.put([Withdrawal(scene.client, None)] if whole_client else [withdrawal_of(each) for each in gone])
    scene.client.wait_until_told(2)
    assert {*scene.client.told} == {with_dispatcher, waiting}
    scene.steps.go.set()
    scene.client.wait_until_told(3)
    assert all(isinstance(ticket.error, Cancelled) for ticket in gone)
    assert scene.steps.made == [b"5", b"6", b"hold"]
    scene.lanes.let_go()
    other.wait_until_told(1)
    assert (computing.error, other.texts(computing)) == (None, [b"10"])
    assert scene.lanes.launched == [0]
    scene.end()


def test_higher_priorities_are_made_first():
    scene = Scene()
    scene.hold()
    scene.send(
        scene.client.ticket(b"1"), scene.client.ticket(b"2", priority=200), scene.client.ticket(b"3", priority=1)
    )
    scene.arrivals.wait_for_turns()
    scene.steps.go.set()
    scene.client.wait_until_told(4)
    assert scene.steps.made == [b"hold", b"3", b"1", b"2"]
    scene.end()


def test_no_more_rows_are_made_than_there_is_room_for_and_all_are_answered():
    scene = Scene()
    scene.lanes.hold()
    scene.send(*(scene.client.ticket(b"1", b"2") for _ in range(12)))
    scene.arrivals.wait_for_turns()
    scene.lanes.wait_until_launched([0])
    assert len(scene.steps.made) <= TABLE_ROWS
    scene.lanes.let_go()
    scene.client.wait_until_told(12)
    assert not any(ticket.error for ticket in scene.end())


def test_the_end_waits_for_what_was_taken():
    scene = Scene(threads=2)
    held = scene.hold(2)
    waiting = scene.send(scene.client.ticket(b"1"), scene.client.ticket(b"2"))
    scene.arrivals.put(None)
    assert not scene.client.told
    scene.steps.go.set()
    assert {*scene.end()} == {*held, *waiting}
    assert not any(ticket.error for ticket in scene.client.told)


def test_what_is_late_is_told_at_the_end_too():
    scene = Scene()
    (held,) = scene.hold()
    (late,) = scene.send(scene.client.ticket(b"1", within_s=0.05))
    scene.arrivals.put(None)
    scene.client.wait_until_told(1)
    assert scene.client.told == [late]
    scene.steps.go.set()
    assert scene.end() == [late, held]


def test_a_lost_device_is_told_to_all():
    scene = Scene(threads=2)
    scene.lanes.wait = lost
    sent = scene.send(*(scene.client.ticket(b"1") for _ in range(8)))
    scene.client.wait_until_told(len(sent))
    assert all(isinstance(ticket.error, EngineStopped) for ticket in sent)
    scene.end()


def lost(batch):
    raise EngineStopped("the device is lost")


def test_rows_are_made_by_one_thread_each_and_the_others_keep_theirs():
    before = torch.get_num_threads()
    scene = Scene(threads=2)
    scene.send(scene.client.ticket(b"1"))
    scene.client.wait_until_told(1)
    scene.end()
    counts = []
    new = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    new.start()
    new.join(WAIT_S)
    assert scene.steps.threads == {1}
    assert counts == [torch.get_num_threads()] == [before]


TEXTS = st.sampled_from([b"1", b"2", b"13", b"14", b"x", b"bug", b"shape"])
REQUESTS = st.lists(
    st.tuples(st.lists(TEXTS, min_size=1, max_size=5), st.sampled_from(["", "withdrawn", "late"]), st.integers(1, 3)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, threads=st.integers(1, 3), gone=st.booleans())
def test_every_request_ends_once_and_rightly_whatever_the_others_are(requests, threads, gone):
    scene = Scene(threads=threads)
    fates = {}
    for texts, fate, priority in requests:
        ticket = scene.client.ticket(*texts, within_s=1e-6 if fate == "late" else 0, priority=priority)
        fates[ticket] = (texts, fate)
        scene.send(ticket)
        if fate == "withdrawn":
            scene.arrivals.put([withdrawal_of(ticket)])
    if gone:
        scene.arrivals.put([Withdrawal(scene.client, None)])
    assert {*scene.end()} == {*fates}
    for ticket, (texts, fate) in fates.items():
        if ticket.error is None:
            assert scene.client.texts(ticket) == [b"%d" % (2 * int(text)) for text in texts]
        elif isinstance(ticket.error, Cancelled):
            assert gone or fate == "withdrawn"
        elif isinstance(ticket.error, DeadlineExceeded):
            assert fate == "late"
        else:
            assert len(texts) > BUCKETS[-1] or {*texts} & {b"13", b"14", b"x", b"bug", b"shape"}
