"""What the service counts of a request, however it ends, and Triton's statistics of it."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.control import ServedModel
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    NotOffered,
    QueueFull,
    TransportFailed,
    UnknownModel,
)
from headrace.frontend.board import FAILURES, Board
from headrace.frontend.http.head import Refused
from headrace.frontend.ledger import Ledger
from headrace.frontend.link import ModelFailed
from headrace.frontend.service import NotReady, Service, all_statistics, model_statistics
from headrace.transport.descriptors import ANSWER, Descriptor

NO_DURATION = {"count": 0, "ns": 0}


def model(version="1"):
    return ServedModel(name="m", version=version, inputs=(), outputs=(), max_batch_size=8)


class Call:
    """A call whose answer has come, if it was given one."""

    def __init__(self, told=None):
        self.told = told
        self.engine = 0

    def close(self):
        pass


class Link:
    """A link that has room, unless it is given an error to refuse with."""

    def __init__(self, told=None, refusal=None, version="1"):
        self.model = model(version)
        self.engine = 0
        self.in_flight = 3
        self.ring = SimpleNamespace(free_rows=10, layout=SimpleNamespace(rows=16))
        self._told = told
        self._refusal = refusal

    def admit(self, rows, deadline_ns, priority):
        if self._refusal:
            raise self._refusal
        return Call(self._told)


def answered(rows, batch_rows):
    return Descriptor(1, ANSWER, 0, rows, 0, batch_rows, 0, 100, 300, 600, 650)


def service_of(*links):
    service = Service(("m",))
    for link in links:
        service.add(link)
    return service


def failures(service):
    return {kind: count for kind, count in service.totals.all()[0].failure_count.items() if count}


def test_an_answered_request_is_counted_with_its_stages():
    service = service_of(Link(answered(2, 4)))
    for _ in range(2):
        with service.call("m", "1", 2):
            pass
    (totals,) = service.totals.all()
    assert (totals.requests, totals.rows, totals.batches) == (2, 4, 1)
    assert (totals.stage_ns["queue"], totals.stage_ns["compute"], totals.stage_ns["respond"]) == (400, 600, 100)
    assert failures(service) == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("no"), "invalid"),
        (DeadlineExceeded("late"), "deadline"),
        (ModelFailed("raised"), "model"),
        (EngineStopped("gone"), "lost"),
        (asyncio.CancelledError(), "cancelled"),
        (Cancelled("left"), "cancelled"),
        (Refused(408, "the body did not come in time"), "invalid"),
        (NotOffered("no shared memory"), "invalid"),
        (TransportFailed("no descriptors"), "internal"),
        (KeyError("ours"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_request_that_fails_is_counted_by_its_reason_and_not_as_answered(error, kind):
    service = service_of(Link(answered(1, 1)))
    with pytest.raises(type(error)), service.call("m", "1", 1):
        raise error
    assert failures(service) == {kind: 1}
    assert kind in FAILURES
    (totals,) = service.totals.all()
    assert totals.requests == 0
    assert totals.failure_ns[kind] > 0


def test_a_refusal_is_counted():
    service = service_of(Link(refusal=QueueFull("full")))
    with pytest.raises(QueueFull), service.call("m", "1", 1):
        pass
    assert failures(service) == {"full": 1}


def test_a_request_that_was_wrong_before_it_was_a_call_is_counted():
    service = service_of(Link())
    service.refused("m", InvalidRequest("no JSON"), 0)
    service.refused("other", InvalidRequest("no JSON"), 0)
    assert failures(service) == {"invalid": 1}


def test_a_request_without_a_backend_is_counted_once_there_was_one():
    service = service_of()
    with pytest.raises(NotReady), service.call("m", None, 1):
        pass
    assert service.totals.all() == []
    link = Link()
    service.add(link)
    service.remove(link)
    with pytest.raises(NotReady), service.call("m", None, 1):
        pass
    assert failures(service) == {"unavailable": 1}


def test_requests_for_models_that_are_not_there_take_no_counters():
    service = service_of(Link())
    with pytest.raises(UnknownModel), service.call("somebody's guess", None, 1):
        pass
    assert [totals.name for totals in service.totals.all()] == ["m"]
    assert failures(service) == {}


def test_a_call_that_nobody_answered_or_awaited_is_no_success():
    service = service_of(Link())
    with service.call("m", "1", 1):
        pass
    assert service.totals.all()[0].requests == 0


def test_what_is_under_way_is_on_the_board_until_the_link_is_gone():
    link = Link()
    service = service_of(link)
    service.sample()
    (totals,) = service.totals.all()
    assert (totals.in_flight, totals.rows_free, totals.rows_room) == (3, 10, 16)
    service.remove(link)
    (totals,) = service.totals.all()
    assert (totals.in_flight, totals.rows_free, totals.rows_room) == (0, 0, 0)


def test_an_old_link_that_ends_takes_nothing_from_its_successor():
    old, new = Link(), Link()
    service = service_of(old, new)
    service.sample()
    service.remove(old)
    assert service.totals.all()[0].in_flight == 3


def test_statistics_are_of_all_frontends():
    board = Board.private()
    service = Service(("m",), totals=Ledger(board, 0))
    service.add(Link(answered(2, 4)))
    for _ in range(2):
        with service.call("m", "1", 2):
            pass
    with pytest.raises(ModelFailed), service.call("m", "1", 1):
        raise ModelFailed("raised")
    (told,) = model_statistics(model(), Ledger(board, 0))["model_stats"]
    assert (told["name"], told["version"]) == ("m", "1")
    assert (told["inference_count"], told["execution_count"]) == (4, 1)
    assert told["last_inference"] > 1_600_000_000_000
    stats = told["inference_stats"]
    assert stats["success"]["count"] == 2
    assert stats["fail"]["count"] == 1
    assert stats["queue"] == {"count": 2, "ns": 400}
    assert stats["compute_infer"] == {"count": 2, "ns": 600}
    for copies in ("compute_input", "compute_output"):
        assert stats[copies] == {"count": 2, "ns": 0}, "as often as compute_infer, or perf_analyzer ends"
    for absent in ("cache_hit", "cache_miss"):
        assert stats[absent] == NO_DURATION
    assert told["batch_stats"] == [
        {
            "batch_size": 4,
            "compute_input": {"count": 1, "ns": 0},
            "compute_infer": {"count": 1, "ns": 300},
            "compute_output": {"count": 1, "ns": 0},
        }
    ]


def test_statistics_of_all_models_name_every_version():
    service = service_of(Link(version="1"), Link(version="2"))
    assert [one["version"] for one in all_statistics(service.totals)["model_stats"]] == ["1", "2"]
