"""The CUDA runtime calls that torch does not offer, or offers at a higher price, with every return code looked at.

Source: CUDA Runtime API (graph management, memory management, event management), through the package cuda-bindings,
which torch's CUDA builds bring along. The calls release the interpreter lock.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from headrace.errors import DeviceUnavailable, EngineStopped

# Errors after which the context answers every call alike: the process must be started anew.
NOT_READY = 600  # cudaErrorNotReady
STICKY = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 720, 999})


def runtime() -> ModuleType:
    """Return cuda.bindings.runtime. Raises DeviceUnavailable with the remedy."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceUnavailable(
            f"lanes on CUDA need the package cuda-bindings ({error}); pip install cuda-bindings, of the CUDA version"
            " that torch was built for, or use --device cpu"
        ) from error


def check(result: Sequence[Any]) -> Any:  # noqa: ANN401  cuda-bindings has no types
    """Return what a call returned beside its code. Raises EngineStopped if the code says that something is wrong."""
    code = int(result[0])
    if code:
        lasting = "; the device must be taken into use anew: start the process again" if code in STICKY else ""
        raise EngineStopped(f"CUDA error {code} ({getattr(result[0], 'name', 'unknown')}){lasting}")
    return result[1] if len(result) == 2 else result[1:]


class BlockingEvent:
    """An event to wait for: spinning a core without the interpreter lock, or sleeping until an interrupt.

    Measured on an H100 at batch 1, launch to answer: 0.23 ms spinning (p99 0.25), 0.32 ms sleeping (p99 0.96).
    """

    def __init__(self, *, spin: bool) -> None:
        self._cuda = runtime()
        flags = self._cuda.cudaEventDisableTiming | (0 if spin else self._cuda.cudaEventBlockingSync)
        self.handle = check(self._cuda.cudaEventCreateWithFlags(flags))

    def record(self, stream: object) -> None:
        check(self._cuda.cudaEventRecord(self.handle, stream))

    def passed(self) -> bool:
        """Tell whether waiting would return at once, well or with an error."""
        return int(self._cuda.cudaEventQuery(self.handle)[0]) != NOT_READY

    def synchronize(self) -> None:
        check(self._cuda.cudaEventSynchronize(self.handle))


class SlotGraph:
    """Copy in, model and copy out as one executable graph, whose host addresses are set anew before each launch.

    A launch that is under way keeps the addresses that it was given. Measured on an H100: setting one copy's address
    costs 2 us, and throughput is that of graphs captured for fixed addresses.
    """

    def __init__(
        self,
        model_graph: int,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        scratch: int,
    ) -> None:
        """Build from torch's captured graph; inputs and outputs are its static tensors, [bucket, *features].

        Inputs that are left out must have been copied in by the time of the launch. `scratch` is the address of pinned
        host memory, as large as any of the tensors: a node must be made with some address, and is then given others.
        """
        self._cuda = cuda = runtime()
        self._to_device = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._to_host = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._inputs = [(tensor.data_ptr(), tensor[0].nbytes) for tensor in inputs]
        self._outputs = [(tensor.data_ptr(), tensor[0].nbytes) for tensor in outputs]
        graph = check(cuda.cudaGraphCreate(0))
        self._h2d = [
            self._copy(graph, [], tensor.data_ptr(), scratch, tensor.nbytes, self._to_device) for tensor in inputs
        ]
        model = check(cuda.cudaGraphAddChildGraphNode(graph, self._h2d, len(self._h2d), cuda.cudaGraph_t(model_graph)))
        self._d2h = [
            self._copy(graph, [model], scratch, tensor.data_ptr(), tensor.nbytes, self._to_host) for tensor in outputs
        ]
        self._graph = graph  # its nodes are how the executable's are named, so it must live as long
        self._exec = check(cuda.cudaGraphInstantiate(graph, 0))

    def launch(self, stream: object, rows: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Run for `rows` rows that lie at these host addresses, one per tensor."""
        set_copy = self._cuda.cudaGraphExecMemcpyNodeSetParams1D
        for node, (device, size), host in zip(self._h2d, self._inputs, inputs, strict=True):
            check(set_copy(self._exec, node, device, host, rows * size, self._to_device))
        for node, (device, size), host in zip(self._d2h, self._outputs, outputs, strict=True):
            check(set_copy(self._exec, node, host, device, rows * size, self._to_host))
        check(self._cuda.cudaGraphLaunch(self._exec, stream))

    def _copy(self, graph: object, after: list[Any], to: int, source: int, size: int, kind: object) -> Any:  # noqa: ANN401
        return check(self._cuda.cudaGraphAddMemcpyNode1D(graph, after, len(after), to, source, size, kind))
