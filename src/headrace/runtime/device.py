"""The seam between a design and the machine: streams, events and pinned memory, on CUDA and on the host.

The host's twins do nothing, because on the host a call returns when its work is done. So a design is one program on
both, and its logic (who hands what to whom, after which event) is tested where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from headrace.errors import DeviceUnavailable

if TYPE_CHECKING:
    from torch import Tensor


class Event(Protocol):
    """Marks a point in a stream."""

    def record(self) -> None:
        """Mark the current stream's end. Hand the event over only afterwards: waiting before it is no wait at all."""


class Stream(Protocol):
    """An order of work on the device."""

    def use(self) -> AbstractContextManager[object]:
        """Make this the calling thread's current stream."""

    def wait(self, event: Event) -> None:
        """Let all later work of this stream begin after `event`; the calling thread goes on."""

    def keeps(self, tensor: Tensor) -> None:
        """Tell the allocator that this stream uses `tensor`, so that its memory is not handed out before this is done.

        Needed for every tensor used on a stream other than the one it was allocated on. Source: PyTorch docs,
        Tensor.record_stream.
        """


class Device(Protocol):
    torch_device: torch.device

    def start(self) -> None:
        """Create what the first use would create (on CUDA, the context). Raises DeviceUnavailable."""

    def stream(self) -> Stream: ...

    def event(self) -> Event: ...

    def pin(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in fresh page-locked memory, from which copies to the device run without the CPU."""

    def register(self, memory: Tensor) -> Callable[[], None]:
        """Make page-aligned memory that is used again and again known to the device: copies of it need no pinning.

        Returns what undoes it, to be called before the memory is unmapped: CUDA refuses to register an address twice.
        """

    def name(self) -> str: ...


class CudaEvent:
    def __init__(self) -> None:
        self.cuda = torch.cuda.Event()

    def record(self) -> None:
        self.cuda.record()


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.cuda)

    def keeps(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)


class CudaDevice:
    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def start(self) -> None:
        if torch.version.cuda is None:
            raise DeviceUnavailable(
                f"--device {self.torch_device}: the installed torch {torch.__version__} is built without CUDA;"
                " install a CUDA build, or use --device cpu"
            )
        count = torch.cuda.device_count()
        if (self.torch_device.index or 0) >= count:
            raise DeviceUnavailable(
                f"--device {self.torch_device}: this machine shows {count} CUDA device{'s' * (count != 1)};"
                " use --device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(self.torch_device)
        torch.empty(1, device=self.torch_device)

    def stream(self) -> Stream:
        return CudaStream(self.torch_device)

    def event(self) -> Event:
        return CudaEvent()

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def register(self, memory: Tensor) -> Callable[[], None]:
        # Source: CUDA Runtime API, cudaHostRegister; 0 asks for the default flags.
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise DeviceUnavailable(
                f"CUDA cannot register {memory.nbytes / 1e6:.0f} MB of shared memory (cudaHostRegister: error {code});"
                " lower --ring-slots or --batch-size, or use --transport queue"
            )
        return lambda: self._unregister(memory.data_ptr())

    def _unregister(self, address: int) -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(address))
        assert code == 0, f"cudaHostUnregister: error {code}"

    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)


class HostEvent:
    def record(self) -> None:
        """Nothing to mark: the work is done."""


class HostStream:
    def use(self) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self, event: Event) -> None:
        """Nothing to wait for: the work is done."""

    def keeps(self, tensor: Tensor) -> None:
        """Nothing to keep: the host frees memory only when nobody refers to it."""


class HostDevice:
    torch_device = torch.device("cpu")

    def start(self) -> None:
        """Nothing to create."""

    def stream(self) -> Stream:
        return HostStream()

    def event(self) -> Event:
        return HostEvent()

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor

    def register(self, memory: Tensor) -> Callable[[], None]:  # noqa: ARG002
        """Nothing to register: the device is the memory's own."""
        return lambda: None

    def name(self) -> str:
        return "cpu"


def divide_cpus(device: Device, workers: int) -> None:
    """Give each of `workers` threads that compute on the host its share of the CPUs; elsewhere change nothing."""
    if device.torch_device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def open_device(name: str) -> Device:
    """Return the device called "cpu", "cuda" or "cuda:N". Touches no driver yet."""
    if name == "cpu":
        return HostDevice()
    index = name.partition(":")[2]
    return CudaDevice(torch.device("cuda", int(index or 0)))
