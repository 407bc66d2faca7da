"""Every design answers every request once, rightly, and tells of every failure. On the host device."""

import threading

import pytest
import torch

from headrace.config import DesignConfig
from headrace.designs import make_published_design
from headrace.errors import ModelError
from headrace.request import Request
from headrace.runtime.device import HostDevice

DESIGNS = {
    "original": DesignConfig(name="original"),
    "executor": DesignConfig(name="executor"),
    "h2d_d2h_threads": DesignConfig(name="h2d_d2h_threads"),
    "2_predict_workers": DesignConfig(name="h2d_d2h_threads", num_workers=2),
    "4_predict_workers": DesignConfig(name="h2d_d2h_threads", num_workers=4),
}


class ListEndpoint:
    """An endpoint that holds all requests, and keeps what is answered."""

    def __init__(self, batches):
        self._batches = batches
        self._lock = threading.Lock()
        self.outputs: dict[int, torch.Tensor] = {}
        self.errors: dict[int, Exception] = {}
        self.order: list[int] = []

    def requests(self):
        for index, batch in enumerate(self._batches):
            yield Request(index=index, inputs=batch)

    def respond(self, request, output):
        with self._lock:
            assert request.index not in self.order, "answered twice"
            self.order.append(request.index)
            self.outputs[request.index] = output

    def fail(self, request, error):
        with self._lock:
            assert request.index not in self.order, "answered twice"
            self.order.append(request.index)
            self.errors[request.index] = error


def batches(count, rows=3, last_rows=None):
    generator = torch.Generator().manual_seed(1)
    sizes = [rows] * (count - 1) + [last_rows or rows]
    return [torch.randn(size, 4, generator=generator) for size in sizes]


@pytest.fixture(params=DESIGNS.values(), ids=DESIGNS.keys())
def design(request):
    return make_published_design(request.param)


@pytest.mark.parametrize("rows", [1, 7], ids=["one row", "seven rows"])
def test_every_request_gets_the_eager_models_answer(design, rows):
    model = torch.nn.Linear(4, 2)
    sent = batches(40, rows, last_rows=rows + 2)
    endpoint = ListEndpoint(sent)
    design.serve(endpoint, HostDevice(), lambda: model)
    assert sorted(endpoint.outputs) == list(range(40))
    for index, batch in enumerate(sent):
        torch.testing.assert_close(endpoint.outputs[index], model(batch).detach())
        assert not endpoint.outputs[index].requires_grad


def test_requests_are_answered_in_order(design):
    endpoint = ListEndpoint(batches(40))
    design.serve(endpoint, HostDevice(), lambda: torch.nn.Linear(4, 2))
    assert endpoint.order == list(range(40))


def test_an_exception_in_the_model_answers_its_request_and_no_other(design):
    def model(inputs):
        if inputs[0, 0] == 99:
            raise ValueError("row is bad")
        return inputs * 2

    sent = batches(9)
    sent[4][0, 0] = 99
    endpoint = ListEndpoint(sent)
    design.serve(endpoint, HostDevice(), lambda: model)
    assert sorted(endpoint.outputs) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [str(error) for error in endpoint.errors.values()] == ["row is bad"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda inputs: (inputs, inputs), "returned tuple"),
        (lambda inputs: inputs.sum(), "returned shape []"),
        (lambda inputs: inputs[:1], "returned shape [1, 4] for 3 rows"),
    ],
    ids=["a tuple", "a scalar", "too few rows"],
)
def test_a_model_that_returns_something_else_is_told(design, model, words):
    endpoint = ListEndpoint(batches(2))
    design.serve(endpoint, HostDevice(), lambda: model)
    assert sorted(endpoint.errors) == [0, 1]
    for error in endpoint.errors.values():
        assert isinstance(error, ModelError)
        assert words in str(error)


class BrokenDevice(HostDevice):
    """Fails in one named place."""

    def __init__(self, place):
        self._place = place

    def pin(self, tensor):
        if self._place == "pin":
            raise RuntimeError("out of pinned memory")
        return tensor

    def event(self):
        if self._place == "event":
            raise RuntimeError("no more events")
        return super().event()


@pytest.mark.parametrize(("place", "words"), [("pin", "pinned memory"), ("event", "no more events")])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_in_a_copy_stage_answers_its_request(place, words, workers):
    endpoint = ListEndpoint(batches(5))
    design = make_published_design(DesignConfig(name="h2d_d2h_threads", num_workers=workers))
    design.serve(endpoint, BrokenDevice(place), lambda: torch.nn.Linear(4, 2))
    assert sorted(endpoint.errors) == list(range(5))
    assert all(words in str(error) for error in endpoint.errors.values())


def test_an_answer_that_cannot_be_copied_out_is_told():
    class Unreadable(torch.Tensor):
        def cpu(self):
            raise RuntimeError("copy out failed")

    for config in DESIGNS.values():
        endpoint = ListEndpoint(batches(3))
        make_published_design(config).serve(
            endpoint, HostDevice(), lambda: lambda inputs: inputs.as_subclass(Unreadable)
        )
        assert sorted(endpoint.errors) == [0, 1, 2]


def test_an_error_of_loading_is_raised_and_leaves_no_thread(design):
    before = set(threading.enumerate())

    def load():
        raise ModelError("wrong keys")

    with pytest.raises(ModelError, match="wrong keys"):
        design.serve(ListEndpoint(batches(3)), HostDevice(), load)
    assert set(threading.enumerate()) == before


def test_the_model_is_loaded_once_and_only_when_a_request_has_come(design):
    loads = []

    def load():
        loads.append(1)
        return torch.nn.Linear(4, 2)

    design.serve(ListEndpoint([]), HostDevice(), load)
    assert loads == []
    design.serve(ListEndpoint(batches(5)), HostDevice(), load)
    assert loads == [1]


def test_a_model_that_python_takes_for_false_is_loaded_once(design):
    """A compiled model refuses len(), and an empty Sequential is false."""

    class Refuses(torch.nn.Sequential):
        def __len__(self):
            raise TypeError("does not support len()")

    endpoint = ListEndpoint(batches(3))
    design.serve(endpoint, HostDevice(), Refuses)
    assert sorted(endpoint.outputs) == [0, 1, 2]


def test_forward_is_stamped_in_order(design):
    seen = []

    class Stamps(ListEndpoint):
        def respond(self, request, output):
            seen.append(request.timeline)
            super().respond(request, output)

    design.serve(Stamps(batches(6)), HostDevice(), lambda: torch.nn.Linear(4, 2))
    assert all(0 < timeline.started_ns <= timeline.computed_ns for timeline in seen)


class ScriptedDevice(HostDevice):
    """Records what a design asks streams and events to do, as a stand-in for CUDA's order rules."""

    def __init__(self):
        self.log: list[tuple] = []
        self.names = iter(["h2d", "d2h", *(f"worker{number}" for number in range(9))])
        self.current = threading.local()

    def stream(self):
        return ScriptedStream(self, next(self.names))

    def event(self):
        return ScriptedEvent(self)


class ScriptedEvent:
    def __init__(self, device):
        self.device, self.recorded_on = device, None

    def record(self):
        self.recorded_on = getattr(self.device.current, "name", None)


class ScriptedStream:
    def __init__(self, device, name):
        self.device, self.name = device, name

    def use(self):
        stream = self

        class Use:
            def __enter__(self):
                stream.device.current.name = stream.name

            def __exit__(self, *_):
                stream.device.current.name = None

        return Use()

    def wait(self, event):
        self.device.log.append((self.name, "waits for", event.recorded_on))

    def keeps(self, tensor):
        self.device.log.append((self.name, "keeps", tuple(tensor.shape)))


def test_streams_wait_only_for_recorded_events_and_keep_what_they_use():
    device = ScriptedDevice()
    endpoint = ListEndpoint(batches(20))
    make_published_design(DesignConfig(name="h2d_d2h_threads", num_workers=2)).serve(
        endpoint, device, lambda: torch.nn.Linear(4, 2)
    )
    waits = [entry for entry in device.log if entry[1] == "waits for"]
    assert {entry[2] for entry in waits if entry[0].startswith("worker")} == {"h2d"}
    assert {entry[2][:6] for entry in waits if entry[0] == "d2h"} == {"worker"}
    keeps = {(entry[0][:6], entry[2]) for entry in device.log if entry[1] == "keeps"}
    assert keeps == {("h2d", (3, 4)), ("worker", (3, 4)), ("d2h", (3, 2))}
