"""Requests over gRPC, by grpcio: messages are bytes that were made beforehand, and answers come as callbacks.

grpcio's threads take the answers, and share an interpreter lock with the one that keeps the plan: what that costs
shows as issue delay. A channel is one connection.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial

import grpc

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import Unreachable
from headrace.processes import exact_sleep
from headrace.target.asking import LARGEST_MESSAGE, SERVICE, status_of
from headrace.target.payloads import open_bodies
from headrace.target.polling import SPIN_NS
from headrace.target.sending import GeneratorJob, Sending

STREAMS = 64  # of a channel: servers allow 100 or more at once, and what is beyond would wait unseen in grpcio
LONGEST_SLEEP_S = 0.2
_SHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
# grpcio's own words for a connection that is gone, which comes as UNAVAILABLE too; seen with grpcio 1.85.
_GONE = ("failed to connect", "Stream removed", "Socket closed", "Connection reset", "Transport closed", "GOAWAY")
_LOST = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class GrpcLoad:
    """Sends one generator's share."""

    def __init__(self, job: GeneratorJob, sending: Sending) -> None:
        self._job, self._sending = job, sending
        self._messages = [bytes(body) for body in open_bodies(job.bodies_path, job.places)]
        self._timeout_s = job.target.request_timeout_s
        limit = max(1, job.target.connections // job.target.generators)
        self._channels: list[grpc.Channel] = []
        self._calls: list[grpc.UnaryUnaryMultiCallable[bytes, bytes]] = []
        self.most_connections = min(limit, -(-(sending.concurrency or STREAMS * 4) // STREAMS))
        self._metadata = job.access.metadata
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)

    def open(self) -> None:
        """Connect before the clock starts. Raises Unreachable."""
        options = [*LARGEST_MESSAGE, ("grpc.use_local_subchannel_pool", 1)]
        for _ in range(self.most_connections):
            channel = self._job.access.channel(self._job.endpoint.target, options)
            self._channels.append(channel)
            try:
                grpc.channel_ready_future(channel).result(timeout=self._timeout_s)
            except grpc.FutureTimeoutError as error:
                raise Unreachable(f"{self._job.url}: no connection within {self._timeout_s:g} s") from error
        self._calls = [channel.unary_unary(SERVICE + "ModelInfer") for channel in self._channels]

    def run(self, start_ns: int) -> None:
        """Send everything and wait for the answers."""
        exact_sleep()
        sending = self._sending
        sending.start(start_ns)
        _sleep_until(start_ns)
        if sending.offsets is None:
            for _ in range(sending.concurrency):
                self._follow(start_ns)
        while (due_ns := sending.next_due_ns()) is not None:
            _sleep_until(due_ns)
            with self._lock:
                number = sending.begin(due_ns)
            self._send(number)
        with self._ended:
            while not sending.finished(now_ns()):
                self._ended.wait(LONGEST_SLEEP_S)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _follow(self, now: int) -> None:
        """In a closed loop, send the next request. One that fails at once calls this again, and must not go deeper."""
        owed: deque[int] | None = getattr(self._thread, "owed", None)
        if owed is not None:
            owed.append(now)
            return
        self._thread.owed = owed = deque([now])
        while owed:
            due_ns = owed.popleft()
            with self._lock:
                number = self._sending.begin(due_ns) if self._sending.may_follow(due_ns) else None
            if number is not None:
                self._send(number)
        self._thread.owed = None

    def _send(self, number: int) -> None:
        call = self._calls[number % len(self._calls)]
        message = self._messages[self._sending.payload(number)]
        with self._lock:
            self._sending.sent(number, now_ns())
        call.future(message, timeout=self._timeout_s, metadata=self._metadata).add_done_callback(
            partial(self._done, number)
        )

    def _done(self, number: int, call: grpc.Future[bytes]) -> None:
        at_ns = now_ns()
        error = call.exception()
        with self._ended:
            if error is None:
                self._sending.answered(number, at_ns, call.result(), None)
            else:
                self._failed(number, at_ns, error)
            self._ended.notify()
        self._follow(at_ns)

    def _failed(self, number: int, at_ns: int, error: Exception) -> None:
        code, details = status_of(error)
        text = f"{code.name}: {details}"
        if code in _LOST or (code == grpc.StatusCode.UNAVAILABLE and any(word in details for word in _GONE)):
            self._sending.lost(text)
        else:
            self._sending.failed(number, at_ns, text, shed=code in _SHED)


def _sleep_until(moment_ns: int) -> None:
    while (left_ns := moment_ns - now_ns()) > 0:
        if left_ns > SPIN_NS:
            time.sleep(min((left_ns - SPIN_NS) / NS_PER_S, LONGEST_SLEEP_S))
