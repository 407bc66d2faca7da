"""The run's main process, which holds the backend.

For `original` it starts the backend as a new process when the word comes, so that warm-up contains the process's start
and imports, as published; for the later designs the backend runs in this very process, whose imports are done by then.
Nothing else runs here: no display, no telemetry, no load.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch._inductor import standalone_compile  # noqa: F401  as torchvision, before the clock starts
from torch.profiler import ProfilerActivity, profile

from headrace.bench import limits
from headrace.bench.jobs import Go, HostDone, HostJob
from headrace.bench.summary import Limits, TorchFacts
from headrace.clock import now_ns
from headrace.designs import make_published_design
from headrace.designs.base import Design, Model
from headrace.designs.lanes import LanesDesign
from headrace.errors import HeadraceError, RunFailed
from headrace.gpus import out_of_memory
from headrace.model import precision
from headrace.model.load import load_model
from headrace.model.optimise import IMAGENET_MEAN, IMAGENET_STD, Normalise
from headrace.pipeline.wiring import LaneSet, keep_compiled_code
from headrace.processes import ChildFailed, Ready, become_child, describe
from headrace.runtime.device import Device, divide_cpus, open_device
from headrace.transport.queue import QueueEndpoint
from headrace.transport.ring import RingEndpoint


def run_host(job: HostJob) -> None:
    """Say ready, wait for the word, hold the backend until the client closes. The target of the process."""
    become_child()
    job.report.send(Ready())
    go = job.report.recv()
    assert isinstance(go, Go)
    if job.design.name != "original":
        run_backend(job, go, [])
        return
    spawn = multiprocessing.get_context("spawn")
    backend = spawn.Process(target=run_backend_process, args=(job, go), name="backend")
    backend.start()
    backend.join()
    if backend.exitcode:  # it reported nothing: pass its end on
        sys.exit(backend.exitcode if backend.exitcode > 0 else 128 - backend.exitcode)


def run_backend_process(job: HostJob, go: Go) -> None:
    """The backend as a process of its own: by now it has been started and has imported all it needs."""
    become_child()
    run_backend(job, go, [("process start and imports", now_ns())])


def run_backend(job: HostJob, go: Go, marks: list[tuple[str, int]]) -> None:
    """Serve until the client closes, then report; or report why not."""
    try:
        device = open_device(job.place.device)
        told = _Told([], [])
        _serve(job, go, device, lambda name: marks.append((name, now_ns())), told)
        done = HostDone(
            marks=tuple(marks),
            facts=torch_facts(device),
            limits=told.limits[0] if told.limits else None,
            notes=tuple(told.notes),
            wall_clock_offset_ns=time.time_ns() - now_ns(),
        )
        job.report.send(done)
    except HeadraceError as error:
        job.report.send(ChildFailed(error))
    except torch.OutOfMemoryError as error:
        job.report.send(
            ChildFailed(out_of_memory(job.place.label or job.place.device, job.place.gpu_uuid, describe(error)))
        )
    except Exception as error:  # noqa: BLE001  the run ends with it
        if os.environ.get("HEADRACE_DEBUG"):
            traceback.print_exc()
        job.report.send(
            ChildFailed(RunFailed(f"the backend stopped: {describe(error)} (HEADRACE_DEBUG=1 shows where)"))
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What a design has to say when all is served."""

    notes: list[str]
    limits: list[Limits]


def _serve(job: HostJob, go: Go, device: Device, mark: Callable[[str], None], told: _Told) -> None:
    """Serve until the client closes."""
    precision.apply(job.model.precision)
    keep_compiled_code(job.model.compile_cache)
    divide_cpus(device, job.place.sharers * job.design.num_workers)
    device.start()
    mark("device context")

    design = _make_design(job, mark, told)
    # The lanes compile by themselves, after their own changes to the model.
    model = replace(job.model, compile=job.model.compile and job.design.name != "lanes")
    checkpoint = Path(go.prepared.checkpoint) if go.prepared.checkpoint else None

    def load() -> Model:
        return load_model(model, checkpoint, device.torch_device, mark)

    with ExitStack() as stack:
        endpoint = QueueEndpoint(job.queues) if go.ring is None else RingEndpoint(go.ring, device.register)
        if isinstance(endpoint, RingEndpoint):
            stack.callback(endpoint.close)
        stack.enter_context(profiled(job.trace, device.torch_device.type))
        design.serve(endpoint, device, load)


def _make_design(job: HostJob, mark: Callable[[str], None], told: _Told) -> Design:
    if job.design.name != "lanes":
        return make_published_design(job.design)
    return LanesDesign(
        num_lanes=job.design.num_workers,
        config=job.lanes,
        normalise=Normalise(mean=IMAGENET_MEAN, std=IMAGENET_STD) if job.uint8 else None,
        compile=job.model.compile,
        precision=job.model.precision,
        keep=job.model.compile_cache,
        mark=mark,
        report=told.notes,
        on_idle=lambda lanes, row, answer: _measure(job, told, lanes, row, answer),
    )


def _measure(job: HostJob, told: _Told, lanes: LaneSet, row_bytes: int, answer_bytes: int) -> None:
    if job.limits_bucket is not None:
        told.limits.append(limits.measure(lanes, job.limits_bucket, row_bytes, answer_bytes))


def torch_facts(device: Device) -> TorchFacts:
    """Return what this process computes with."""
    cudnn_tf32, matmul_tf32 = precision.actual()
    on_cuda = device.torch_device.type == "cuda"
    return TorchFacts(
        torch=str(torch.__version__),
        torchvision=torchvision.__version__,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=torch.backends.cudnn.version() if on_cuda else None,
        device_name=device.name(),
        cudnn_tf32=cudnn_tf32 and on_cuda,
        matmul_tf32=matmul_tf32 and on_cuda,
        threads=torch.get_num_threads(),
    )


@contextmanager
def profiled(path: Path | None, device_type: str) -> Iterator[None]:
    """Profile all threads of this process and write a Chrome trace to `path`; do nothing if it is None."""
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type == "cuda")
    # Without it the operators of the predict and copy threads are left out, and only their kernels are shown.
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # noqa: SLF001
    with profile(activities=activities, experimental_config=all_threads) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
