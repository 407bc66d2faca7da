"""Which versions a frontend knows, sends to, and says that it has."""

import asyncio
from dataclasses import dataclass, field

import pytest

from headrace.control import ServedModel, VersionStatus
from headrace.errors import InvalidRequest, UnknownModel
from headrace.frontend.service import ControlOff, NotReady, Service, repository_index


class Link:
    def __init__(self, version, name="cat", in_flight=0):
        self.model = ServedModel(name=name, version=version, inputs=(), outputs=(), max_batch_size=1)
        self.engine = 0
        self.in_flight = in_flight


def status(version, state="READY", reason="", required=None, name="cat"):
    required = state == "READY" if required is None else required
    return VersionStatus(name=name, version=version, state=state, reason=reason, required=required)


@pytest.fixture
def service():
    return Service(("cat",))


def test_a_frontend_that_has_heard_nothing_is_not_ready(service):
    assert not service.is_ready()
    with pytest.raises(NotReady):
        service.model("cat", None)


@pytest.mark.parametrize(
    ("statuses", "ready"),
    [
        ([status("1")], True),
        ([status("1"), status("2", "LOADING")], True),
        ([status("1"), status("2", "UNAVAILABLE", "failed")], True),
        ([status("1"), status("2", "LOADING", required=True)], False),
        ([status("1"), status("3", "UNAVAILABLE", required=True, name="dog")], False),
    ],
    ids=["all", "another loads beside it", "another failed", "one must come", "another model's backend died"],
)
def test_a_frontend_is_ready_when_every_version_that_must_be_there_is(service, statuses, ready):
    service.set_statuses(tuple(statuses))
    assert not service.is_ready(), "not connected"
    service.add(Link("1"))
    assert service.is_ready() is ready
    service.draining = True
    assert not service.is_ready()


def test_without_a_version_the_highest_number_serves(service):
    for version in ("9", "10", "2"):
        service.add(Link(version))
    assert service.model("cat", None).version == "10"
    assert service.model("cat", "9").version == "9"
    assert service.versions("cat") == ("2", "9", "10")


def test_what_retires_gets_no_requests_and_is_still_under_way(service):
    old, new = Link("1", in_flight=3), Link("2", in_flight=1)
    service.add(old)
    service.add(new)
    service.retire(old)
    assert service.versions("cat") == ("2",)
    assert service.in_flight == 4
    service.remove(old)
    assert service.in_flight == 1


def test_a_version_that_is_replaced_by_itself_retires(service):
    old, new = Link("1", in_flight=3), Link("1")
    service.add(old)
    service.add(new)
    assert service.in_flight == 3
    service.retire(old)
    service.remove(old)
    assert service.in_flight == 0
    assert service.versions("cat") == ("1",)


@pytest.mark.parametrize(
    ("statuses", "version", "error", "words"),
    [
        ([status("1", "LOADING")], None, NotReady, "model cat is not ready: it is being loaded"),
        ([status("1", "UNAVAILABLE", "it died", required=True)], None, NotReady, "not ready: it died; try again"),
        ([status("1", "UNAVAILABLE", "unloaded")], None, UnknownModel, "model cat is not loaded: unloaded"),
        ([status("1", "UNLOADING")], "1", UnknownModel, "version 1 of model cat is not loaded: unloading"),
        ([status("1")], "7", UnknownModel, "model cat has no version 7; it has 1"),
        ([status("1", name="dog")], None, UnknownModel, "there is no model cat; this server has dog"),
    ],
    ids=["loading", "dead", "unloaded", "unloading", "no such version", "no such model"],
)
def test_a_model_that_is_not_there_is_said_to_be_worth_waiting_for_or_not(service, statuses, version, error, words):
    service.set_statuses(tuple(statuses))
    with pytest.raises(error, match=words):
        service.model("cat", version)


def test_the_index_says_what_the_supervisor_said_except_where_this_frontend_knows_better(service):
    service.set_statuses((status("1"), status("2"), status("3", "UNAVAILABLE", "no weights")))
    service.add(Link("1"))
    assert [(each["version"], each["state"], each["reason"]) for each in repository_index(service)] == [
        ("1", "READY", ""),
        ("2", "UNAVAILABLE", "not connected"),
        ("3", "UNAVAILABLE", "no weights"),
    ]


@dataclass
class Control:
    asked: list = field(default_factory=list)

    async def change(self, verb, name):
        self.asked.append((verb, name))


@pytest.mark.parametrize(
    ("name", "parameters", "error"),
    [
        ("cat", {"config": "{}"}, InvalidRequest),
        ("../cat", {}, UnknownModel),
        ("cat\n", {}, UnknownModel),
        ("", {}, UnknownModel),
        ("x" * 200, {}, UnknownModel),
    ],
    ids=["parameters", "a path", "a line's end", "nothing", "too long"],
)
def test_what_is_no_change_is_refused_here(service, name, parameters, error):
    service.control = Control()
    with pytest.raises(error):
        asyncio.run(service.load(name, parameters))
    assert not service.control.asked


def test_changes_are_passed_on_where_they_are_allowed(service):
    with pytest.raises(ControlOff):
        asyncio.run(service.load("cat"))
    service.control = Control()
    asyncio.run(service.load("cat", {}))
    asyncio.run(service.unload("cat", {"unload_dependents": True}))
    assert service.control.asked == [("load", "cat"), ("unload", "cat")]
