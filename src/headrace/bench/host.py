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
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

from headrace.bench.jobs import Go, HostDone, HostJob
from headrace.bench.summary import TorchFacts
from headrace.clock import now_ns
from headrace.designs import make_design
from headrace.designs.base import Model
from headrace.errors import HeadraceError, RunFailed
from headrace.model import precision
from headrace.model.load import load_model
from headrace.processes import ChildFailed, Ready, become_child, describe
from headrace.runtime.device import Device, open_device
from headrace.transport.queue import QueueEndpoint
from headrace.transport.ring import RingEndpoint


def run_host(job: HostJob) -> None:
    """Say ready, wait for the word, hold the backend until the client closes. The target of the process."""
    become_child()
    job.report.send(Ready())
    go = job.report.recv()
    assert isinstance(go, Go)
    if not make_design(job.design).own_process:
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
        device = open_device(job.device)
        _serve(job, go, device, lambda name: marks.append((name, now_ns())))
        offset = time.time_ns() - now_ns()
        job.report.send(HostDone(marks=tuple(marks), facts=torch_facts(device), wall_clock_offset_ns=offset))
    except HeadraceError as error:
        job.report.send(ChildFailed(error))
    except Exception as error:  # noqa: BLE001  the run ends with it
        if os.environ.get("HEADRACE_DEBUG"):
            traceback.print_exc()
        job.report.send(
            ChildFailed(RunFailed(f"the backend stopped: {describe(error)} (HEADRACE_DEBUG=1 shows where)"))
        )


def _serve(job: HostJob, go: Go, device: Device, mark: Callable[[str], None]) -> None:
    precision.apply(job.model.precision)
    if device.torch_device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.design.num_workers))
    device.start()
    mark("device context")

    endpoint = RingEndpoint(go.ring, device.register) if go.ring else QueueEndpoint(job.queues)
    checkpoint = Path(go.prepared.checkpoint) if go.prepared.checkpoint else None

    def load() -> Model:
        return load_model(job.model, checkpoint, device.torch_device, mark)

    with profiled(job.trace, device.torch_device.type):
        make_design(job.design).serve(endpoint, device, load)


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
