"""As much of CUDA as lanes use, emulated on the host: graphs run when they are launched, device memory is host memory.

It keeps what a real device would not forgive: a copy node is known by the graph that it was made in, a graph can be
launched only once it is executable, and what is copied must lie in memory that somebody holds.
"""

import contextlib
import ctypes
import enum
import types

import torch


class Code(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorNotReady = 600


class Graph:
    def __init__(self):
        self.nodes = []


class Node:
    def __init__(self, graph, **what):
        self.graph = graph
        vars(self).update(what)


class Executable:
    def __init__(self, graph):
        self.graph = graph
        self.copies = {}


class EmulatedRuntime:
    """Twin of cuda.bindings.runtime. `calls` counts what was asked of it."""

    cudaEventDisableTiming, cudaEventBlockingSync = 2, 1
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self):
        self.captured = {}
        self.calls = []

    def cudaEventCreateWithFlags(self, flags):
        return Code.cudaSuccess, object()

    def cudaEventRecord(self, event, stream):
        return (Code.cudaSuccess,)

    def cudaEventQuery(self, event):
        return (Code.cudaSuccess,)

    def cudaEventSynchronize(self, event):
        return (Code.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.calls.append("wait")
        return (Code.cudaSuccess,)

    def cudaStream_t(self, handle):
        return handle

    def cudaGraph_t(self, handle):
        return self.captured[handle]

    def cudaGraphCreate(self, flags):
        return Code.cudaSuccess, Graph()

    def cudaGraphAddMemcpyNode1D(self, graph, after, count, target, source, size, kind):
        assert len(after) == count
        assert all(node.graph is graph for node in after)
        node = Node(graph, copy=(target, source, size))
        graph.nodes.append(node)
        return Code.cudaSuccess, node

    def cudaGraphAddChildGraphNode(self, graph, after, count, child):
        assert len(after) == count
        node = Node(graph, child=child)
        graph.nodes.append(node)
        return Code.cudaSuccess, node

    def cudaGraphInstantiate(self, graph, flags):
        return Code.cudaSuccess, Executable(graph)

    def cudaGraphExecMemcpyNodeSetParams1D(self, executable, node, target, source, size, kind):
        assert node.graph is executable.graph
        executable.copies[node] = (target, source, size)
        return (Code.cudaSuccess,)

    def cudaGraphLaunch(self, executable, stream):
        self.calls.append("launch")
        self._run(executable.graph, executable.copies)
        return (Code.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.calls.append("copy")
        ctypes.memmove(target, source, size)
        return (Code.cudaSuccess,)

    def _run(self, graph, copies):
        if callable(graph):
            graph()
            return
        for node in graph.nodes:
            if hasattr(node, "copy"):
                ctypes.memmove(*copies.get(node, node.copy))
            else:
                self._run(node.child, {})


class EmulatedTorch:
    """torch as `runtime.cuda_lane` uses it. A captured model is called again whenever its graph is launched."""

    no_grad = staticmethod(torch.no_grad)
    Tensor, uint8 = torch.Tensor, torch.uint8

    def __init__(self, runtime):
        self._runtime = runtime
        self._capturing = None
        self.cuda = types.SimpleNamespace(
            Stream=EmulatedStream,
            CUDAGraph=EmulatedGraph,
            graph=self._graph,
            stream=lambda stream: contextlib.nullcontext(),
        )

    def empty(self, size, dtype, pin_memory):
        assert pin_memory
        return torch.empty(size, dtype=dtype)

    @contextlib.contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode):
        self._capturing = graph
        yield
        self._capturing = None

    def capturable(self, model):
        """Return the model as a lane should get it: its calls within a capture are what the graph will do."""

        def run(*inputs):
            outputs = model(*inputs)
            if self._capturing is None:
                return outputs
            static = tuple(output.clone() for output in outputs)

            def replay():
                with torch.no_grad():
                    for place, output in zip(static, model(*inputs), strict=True):
                        place.copy_(output)

            self._runtime.captured[self._capturing.raw_cuda_graph()] = replay
            return static

        return run


class EmulatedStream:
    def __init__(self, device):
        self.cuda_stream = id(self)

    def synchronize(self):
        pass


class EmulatedGraph:
    def __init__(self, keep_graph):
        assert keep_graph

    def raw_cuda_graph(self):
        return id(self)

    def pool(self):
        return "pool"
