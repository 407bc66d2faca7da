"""Lanes of CUDA on an emulated device: the right bytes to the right places, whatever the sizes and addresses."""

import pytest
import torch

from headrace.errors import EngineStopped, ModelError
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.runtime import cuda, cuda_lane
from headrace.runtime.device import HostDevice
from headrace.tensors import TensorSpec
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import Layout
from tests.runtime.emulated_cuda import Code, EmulatedRuntime, EmulatedTorch

WAIT_S = 60
BUCKETS = (1, 4, 8)
LAYOUT = Layout(
    rows=40,
    inputs=(
        TensorSpec(name="values", dtype="float32", features=(6,)),
        TensorSpec(name="ids", dtype="int64", features=()),
    ),
    outputs=(
        TensorSpec(name="scores", dtype="float32", features=(30,)),  # larger than the inputs
        TensorSpec(name="twice", dtype="int64", features=()),
    ),
)


def model(values, ids):
    return values.repeat(1, 5) + ids.float().unsqueeze(1), ids * 2


@pytest.fixture
def emulated(monkeypatch):
    runtime = EmulatedRuntime()
    emulated_torch = EmulatedTorch(runtime)
    for module in (cuda, cuda_lane):
        monkeypatch.setattr(module, "runtime", lambda: runtime)
    monkeypatch.setattr(cuda_lane, "torch", emulated_torch)
    return runtime, emulated_torch


def lane_of(emulated, *, prefetch, run=model, slots=3):
    copies = cuda_lane.CopyStream("cpu") if prefetch else None
    buffers = [(torch.zeros(BUCKETS[-1], 6), torch.zeros(BUCKETS[-1], dtype=torch.int64)) for _ in range(slots)]
    lane = cuda_lane.CudaLane(buffers, copies, spin=True)
    for bucket in reversed(BUCKETS):
        lane.capture(emulated[1].capturable(run), bucket)
    return lane


@pytest.mark.parametrize("whole_bytes", [0, 1 << 40], ids=["copies ahead", "whole graphs"])
@pytest.mark.parametrize("prefetch", [True, False], ids=["copy stream", "no copy stream"])
def test_every_request_gets_the_models_answer_wherever_its_rows_lie(emulated, monkeypatch, whole_bytes, prefetch):
    monkeypatch.setattr(cuda_lane, "WHOLE_BYTES", whole_bytes)
    source = LocalSource(LAYOUT, HostDevice().register)
    dispatcher = Dispatcher(
        [lane_of(emulated, prefetch=prefetch) for _ in range(2)], BatchingConfig(buckets=BUCKETS), 3
    )
    dispatcher.start()
    held = [source.place(request(1, 0), WAIT_S) for _ in range(20)]
    for ticket in held[::2]:
        source.give_back(ticket)  # holes of one row: what follows is gathered from them
    gathered = False
    for seed in range(20):
        requests = [request(rows, seed) for rows in (1, 2, 3, 1, 1, 1, 1, 1, 5)]
        tickets = [source.place(each, WAIT_S) for each in requests]
        dispatcher.submit(tickets)
        for (values, ids), ticket in zip(requests, tickets, strict=True):
            scores, twice = ticket.future.result(WAIT_S)
            assert torch.equal(scores, model(values, ids)[0])
            assert torch.equal(twice, ids * 2)
        gathered |= any(ticket.batch_rows > ticket.rows for ticket in tickets)
    dispatcher.stop()
    source.close()
    assert gathered
    assert ("wait" in emulated[0].calls) == (prefetch and (whole_bytes == 0 or "copy" in emulated[0].calls))


def request(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 99, (rows,), generator=generator)


def test_a_small_request_is_one_launch_and_a_large_one_a_copy_ahead_of_it(emulated, monkeypatch):
    runtime, _ = emulated
    monkeypatch.setattr(cuda_lane, "WHOLE_BYTES", 2 * (6 * 4 + 8))
    source = LocalSource(LAYOUT, HostDevice().register)
    dispatcher = Dispatcher([lane_of(emulated, prefetch=True)], BatchingConfig(buckets=BUCKETS), 1)
    dispatcher.start()
    for rows, calls in ((2, ["launch"]), (3, ["copy", "copy", "wait", "launch"])):
        runtime.calls.clear()
        ticket = source.place(request(rows, 1), WAIT_S)
        dispatcher.submit([ticket])
        ticket.future.result(WAIT_S)
        assert runtime.calls == calls
    dispatcher.stop()
    source.close()


def test_a_model_that_answers_fewer_rows_is_refused_when_it_is_captured(emulated):
    with pytest.raises(ModelError, match="first dimension must be the rows"):
        lane_of(emulated, prefetch=False, run=lambda values, ids: (values[:1], ids[:1]))


def test_a_call_that_fails_ends_the_engine_and_names_the_error(emulated):
    runtime, _ = emulated
    lane = lane_of(emulated, prefetch=False)
    runtime.cudaGraphLaunch = lambda executable, stream: (Code.cudaErrorNotReady,)
    with pytest.raises(EngineStopped, match=r"CUDA error 600 \(cudaErrorNotReady\)"):
        lane.replay(1)
