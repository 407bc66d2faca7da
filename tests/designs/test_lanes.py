"""The lanes on the host device, over a ring and over a queue: every request answered once, rightly, failures told."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.config import LanesConfig
from headrace.designs.lanes import LanesDesign
from headrace.errors import ModelError
from headrace.model.signature import FlatModel
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.runtime.device import HostDevice
from headrace.runtime.host_lane import HostLane
from headrace.tensors import TensorSpec
from headrace.transport.descriptors import ERROR, REQUEST, Descriptor, pack, unpack
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair
from headrace.transport.ring import RingClient, RingEndpoint
from tests.designs.test_designs import ListEndpoint

WAIT_S = 60
BUCKETS = (1, 4, 8)
FEATURES, CLASSES = 4, 2
TABLE_ROWS = 40  # of the ring


class Ring:
    """A ring within this process, and its client, which sends what fits, all of it before anybody serves."""

    def __init__(self, batches):
        spec = {"dtype": "float32"}
        layout = Layout(
            rows=TABLE_ROWS,
            inputs=(TensorSpec(name="input", features=(FEATURES,), **spec),),
            outputs=(TensorSpec(name="output", features=(CLASSES,), **spec),),
        )
        self.pair = RingPair.create(layout)
        self.client = RingClient(self.pair)
        self.endpoint = RingEndpoint(self.pair, HostDevice().register)
        self.outputs, self.errors, self.told = {}, {}, []
        self._left = list(enumerate(batches))
        self._total = len(batches)
        self._send()

    def _send(self):
        while self._left:
            index, batch = self._left[0]
            first = self.client.lease(len(batch))
            if first is None:
                return
            self._left.pop(0)
            self.client.table.inputs[0][first : first + len(batch)].copy_(batch)
            self.client.send(pack(Descriptor(index, REQUEST, first, len(batch))))

    def serve(self, serve):
        """Be the client while `serve` is at work on another thread; raise what it raises."""
        try:
            with ThreadPoolExecutor(1) as server:
                serving = server.submit(serve, self.endpoint)
                while len(self.told) < self._total and not serving.done():
                    for told in unpack(self.client.take(0.1)):
                        self._keep(told)
                    self._send()
                self.client.close()
                serving.result(WAIT_S)
        finally:
            self.endpoint.close()
            self.pair.close()

    def _keep(self, told):
        assert told.request not in {each.request for each in self.told}, "answered twice"
        self.told.append(told)
        if told.kind == ERROR:
            self.errors[told.request] = self.client.error_text(told.entry)
        else:
            rows = slice(told.first_row, told.first_row + told.rows)
            self.outputs[told.request] = self.client.table.outputs[0][rows].clone()
        self.client.release(told.first_row, told.rows)


def over_a_ring(design, model, batches):
    """Return what became of the requests: outputs and errors, by index."""
    ring = Ring(batches)
    ring.serve(lambda endpoint: design.serve(endpoint, HostDevice(), lambda: model))
    return ring.outputs, ring.errors


def over_a_queue(design, model, batches):
    endpoint = ListEndpoint(batches)
    design.serve(endpoint, HostDevice(), lambda: model)
    return endpoint.outputs, {index: f"{type(error).__name__}: {error}" for index, error in endpoint.errors.items()}


BOTH_WAYS = pytest.mark.parametrize("over", [over_a_ring, over_a_queue], ids=["over a ring", "over a queue"])


def design_of(lanes=1, *, compile=False, delay_us=0, mark=lambda name: None, **options):  # noqa: A002  as its field
    return LanesDesign(
        num_lanes=lanes,
        config=LanesConfig(buckets=BUCKETS, max_queue_delay_us=delay_us),
        compile=compile,
        precision="float32",
        normalise=None,
        keep=None,
        mark=mark,
        report=[],
        **options,
    )


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(FEATURES, CLASSES)


def batches_of(sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, FEATURES, generator=generator) for rows in sizes]


SIZES = {
    "one row": [1] * 60,
    "seven rows": [7] * 20,
    "an odd last batch": [7] * 9 + [5],
    "one request": [3],
    "as large as the largest bucket": [8] * 10,
    "mixed": [1, 3, 8, 2, 7, 1, 1, 5, 4, 6, 8, 1, 2, 2, 1, 7],
}


@BOTH_WAYS
@pytest.mark.parametrize("lanes", [1, 3], ids=["one lane", "three lanes"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_request_gets_the_eager_models_answer(over, lanes, sizes):
    model, design, sent = linear(), design_of(lanes), batches_of(sizes)
    outputs, errors = over(design, model, sent)
    assert errors == {}
    assert sorted(outputs) == list(range(len(sent)))
    for index, batch in enumerate(sent):
        torch.testing.assert_close(outputs[index], model(batch).detach())
        assert not outputs[index].requires_grad
    assert "recompiles while serving: 0" in design.report


@BOTH_WAYS
def test_a_compiled_model_is_not_compiled_again_whatever_sizes_come(over):
    model, design, sent = linear(), design_of(compile=True), batches_of(SIZES["mixed"])
    outputs, errors = over(design, model, sent)
    assert errors == {}
    for index, batch in enumerate(sent):
        torch.testing.assert_close(outputs[index], model(batch).detach())
    assert design.report[:1] == ["lanes: host"]
    assert not any("uncompiled" in line for line in design.report)
    assert "recompiles while serving: 0" in design.report


def test_a_compiled_model_is_not_compiled_again_whichever_lane_runs_it():
    for _ in range(10):
        torch._dynamo.reset()
        design = design_of(3, compile=True)
        _, errors = over_a_ring(design, linear(), batches_of(SIZES["mixed"] * 4))
        assert errors == {}
        assert "recompiles while serving: 0" in design.report


def test_requests_that_wait_together_are_gathered_into_buckets():
    ring, design = Ring(batches_of([1] * 27)), design_of()
    ring.serve(lambda endpoint: design.serve(endpoint, HostDevice(), linear))
    assert sorted(told.batch_rows for told in ring.told) == [*[3] * 3, *[8] * 24]


def test_a_request_over_a_ring_is_told_of_where_and_when_it_ran():
    ring, design = Ring(batches_of([8] * 12)), design_of(3)
    ring.serve(lambda endpoint: design.serve(endpoint, HostDevice(), linear))
    assert {told.lane for told in ring.told} <= {0, 1, 2}
    for told in ring.told:
        assert 0 < told.received_ns <= told.started_ns <= told.computed_ns <= told.responded_ns


def test_a_request_over_a_queue_is_stamped_in_order():
    seen = []

    class Stamps(ListEndpoint):
        def respond(self, request, output):
            seen.append(request.timeline)
            super().respond(request, output)

    design_of(2).serve(Stamps(batches_of([2] * 9)), HostDevice(), linear)
    assert len(seen) == 9
    assert all(0 < line.started_ns <= line.computed_ns for line in seen)


class Touchy(torch.nn.Module):
    """Fails on a row that begins with 99."""

    def forward(self, inputs):
        if (inputs[:, 0] == 99).any():
            raise ValueError("row is bad\nand a second line")
        return inputs[:, :CLASSES] * 2


@BOTH_WAYS
@pytest.mark.parametrize("lanes", [1, 3], ids=["one lane", "three lanes"])
@pytest.mark.parametrize("rows", [1, 3], ids=["of one row", "of three rows"])
def test_an_exception_in_the_model_answers_its_request_and_no_other(over, lanes, rows):
    sent = batches_of([rows] * 13)
    for bad in (4, 11):
        sent[bad][rows - 1, 0] = 99
    outputs, errors = over(design_of(lanes), Touchy(), sent)
    assert sorted(errors) == [4, 11]
    assert all(error.startswith("ValueError: row is bad") for error in errors.values())
    for index in set(range(13)) - {4, 11}:
        assert outputs[index].equal(sent[index][:, :CLASSES] * 2)


@BOTH_WAYS
def test_an_exception_of_the_first_request_answers_it_and_no_other(over):
    sent = batches_of([1] * 5)
    sent[0][0, 0] = 99
    outputs, errors = over(design_of(), Touchy(), sent)
    assert sorted(errors) == [0]
    assert sorted(outputs) == [1, 2, 3, 4]


@pytest.mark.parametrize("features", [FEATURES + 1, 1], ids=["too many features", "one, which copy_ spreads"])
def test_a_request_of_another_shape_over_a_queue_is_told_and_the_others_go_on(features):
    endpoint = ListEndpoint([*batches_of([2, 2]), torch.ones(2, features), *batches_of([2])])
    design_of().serve(endpoint, HostDevice(), linear)
    assert sorted(endpoint.errors) == [2]
    assert sorted(endpoint.outputs) == [0, 1, 3]


def test_a_model_that_returns_something_else_than_a_tensor_is_refused():
    class Two(torch.nn.Module):
        def forward(self, inputs):
            return inputs, inputs

    with pytest.raises(ModelError, match="the model returned tuple"):
        design_of().serve(ListEndpoint(batches_of([1])), HostDevice(), Two)


@BOTH_WAYS
def test_the_model_is_loaded_once_and_only_when_a_request_has_come(over):
    loads = []

    class Design:
        def serve(self, endpoint, device, load):
            def counted():
                loads.append(1)
                return load()

            design_of(2).serve(endpoint, device, counted)

    assert over(Design(), linear(), []) == ({}, {})
    assert loads == []
    outputs, _ = over(Design(), linear(), batches_of([1] * 5))
    assert len(outputs) == 5
    assert loads == [1]


@BOTH_WAYS
def test_an_error_of_loading_is_raised_and_leaves_no_thread(over):
    before = set(threading.enumerate())

    class Design:
        def serve(self, endpoint, device, load):
            def fails():
                raise ModelError("wrong keys")

            design_of(2).serve(endpoint, device, fails)

    with pytest.raises(ModelError, match="wrong keys"):
        over(Design(), linear(), batches_of([1] * 3))
    assert set(threading.enumerate()) == before


@BOTH_WAYS
def test_no_thread_is_left_and_the_lanes_are_shown_once_when_all_is_answered(over):
    before, marks, shown = set(threading.enumerate()), [], []

    def on_idle(lanes, row_bytes, answer_bytes):
        shown.append((len(lanes.lanes), row_bytes, answer_bytes))

    outputs, _ = over(design_of(3, mark=marks.append, on_idle=on_idle), linear(), batches_of([2] * 10))
    assert len(outputs) == 10
    assert shown == [(3, FEATURES * 4, CLASSES * 4)]
    assert marks == ["optimise", "warm-up", "lanes"]
    assert set(threading.enumerate()) == before


@BOTH_WAYS
def test_with_a_delay_the_last_part_of_a_batch_is_answered_too(over):
    outputs, errors = over(design_of(delay_us=2000), linear(), batches_of([1] * 11))
    assert (sorted(outputs), errors) == (list(range(11)), {})


@pytest.mark.parametrize("lanes", [1, 3], ids=["one lane", "three lanes"])
def test_the_loop_answers_a_rings_requests_as_the_threads_do(lanes):
    model, sent = linear(), batches_of(SIZES["mixed"] * 5)
    ring = Ring(sent)

    def serve(endpoint):
        flat, buffers = FlatModel(model, None), [torch.zeros(BUCKETS[-1], FEATURES)]
        host_lanes = [HostLane(flat, [tensor.clone() for tensor in buffers], padded=False) for _ in range(lanes)]
        Dispatcher(host_lanes, BatchingConfig(buckets=BUCKETS), 2).serve(endpoint)
        for lane in host_lanes:
            lane.close()

    ring.serve(serve)
    assert ring.errors == {}
    for index, batch in enumerate(sent):
        torch.testing.assert_close(ring.outputs[index], model(batch).detach())
