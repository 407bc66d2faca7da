"""The null server over gRPC: the same laws, the same log, behind grpcio's server.

A thread of grpcio's waits for each request, and answers when the law says. The law begins when the handler is called,
which is after grpcio has read the request and found a thread for it, and ends when the handler returns, before grpcio
has written: what lies outside, on either side, counts as the harness's own. It cannot be told apart from here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import InvalidOption
from headrace.processes import allow_open_files, become_child, exact_sleep, failures_reported
from headrace.target.law import MODEL, Fate, Law
from headrace.target.null_model import NullModel
from headrace.target.null_server import Course, Listening, NullJob
from headrace.wire.grpc import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
CONTROL = "headrace.Null"
RESET, LOG = f"/{CONTROL}/Reset", f"/{CONTROL}/Log"
THREADS = 1024  # requests that can wait at once; more wait unseen in grpcio
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]

Context = grpc.ServicerContext
Handler = Callable[[bytes, Context], bytes]


def run_null_grpc(job: NullJob) -> None:
    """Serve until terminated. The target of a process."""
    become_child()
    with failures_reported(job.report, "the null server failed"):
        server = NullGrpcServer(job.law, honest=True)
        job.report.send(Listening(server.start("127.0.0.1", 0)))
        server.wait()


class NullGrpcServer:
    """Serves the law on a port."""

    def __init__(self, law: Law, *, honest: bool = False) -> None:
        allow_open_files()
        self._law = law
        self._model = NullModel(law.input_bytes)
        self._lock = threading.Lock()
        self._course = Course(law, honest=honest)
        self._answered = self._refused = 0
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="request", initializer=exact_sleep)
        self._server = grpc.server(threads, options=UNLIMITED)
        handlers: dict[str, Handler] = {
            "ModelInfer": self._infer,
            "ModelMetadata": lambda _message, _context: self._model.metadata_message(),
            "ModelStatistics": self._statistics,
            "ServerReady": lambda _message, _context: pb.ServerReadyResponse(ready=True).SerializeToString(),
        }
        self._add(SERVICE, handlers)
        self._add(CONTROL, {"Reset": self._reset, "Log": lambda _message, _context: self._course.as_npy()})

    def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes any that is free. Return the port. Raises InvalidOption."""
        try:
            taken = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise InvalidOption(f"--port {port}: cannot listen on {host}; name another") from error
        self._server.start()
        return taken

    def wait(self) -> None:
        """Serve until the process ends."""
        self._server.wait_for_termination()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def _add(self, service: str, handlers: dict[str, Handler]) -> None:
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])

    def _infer(self, message: bytes, context: Context) -> bytes:
        with self._lock:
            arrived_ns = now_ns()
            course = self._course  # which a reset replaces
            fate, service_ns = course.turn()
            if fate == Fate.SHED:
                due_ns, place = arrived_ns, course.refuse(arrived_ns)
            else:
                key = self._model.answer_message(message, wrong=False)[1] if self._law.cached else 0
                due_ns, place = course.queue(fate, arrived_ns, service_ns, key)
        if fate == Fate.DROP:
            _until_it_gives_up(context)
            return b""
        try:
            answer = self._model.answer_message(message, wrong=fate == Fate.WRONG)[0]
        except ValueError as error:
            self._end(course, place, refused=True)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        _sleep_until(due_ns)
        self._end(course, place, refused=fate == Fate.SHED)
        if fate == Fate.SHED:
            context.abort(grpc.StatusCode.UNAVAILABLE, "shed, as the law says")
        return answer

    def _end(self, course: Course, place: int, *, refused: bool) -> None:
        with self._lock:
            course.answered(place)
            self._answered += not refused
            self._refused += refused

    def _reset(self, _message: bytes, _context: Context) -> bytes:
        with self._lock:
            self._course = Course(self._law, honest=False)
        return b""

    def _statistics(self, _message: bytes, _context: Context) -> bytes:
        response = pb.ModelStatisticsResponse()
        stats = response.model_stats.add(name=MODEL, version="1", inference_count=self._answered)
        stats.inference_stats.success.count = self._answered
        stats.inference_stats.fail.count = self._refused
        return response.SerializeToString()


def _until_it_gives_up(context: Context) -> None:
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()


def _sleep_until(moment_ns: int) -> None:
    while (left_ns := moment_ns - now_ns()) > 0:
        time.sleep(left_ns / NS_PER_S)
