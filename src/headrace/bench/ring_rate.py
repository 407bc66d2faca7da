"""How many messages a second the ring carries between two processes: a request of one byte there, its answer back.

No server can take more requests than this, however large they are.
"""

from __future__ import annotations

import numpy as np

from headrace.bench.limits import rate
from headrace.bench.limits_jobs import EchoJob
from headrace.bench.limits_report import RingRates
from headrace.clock import now_ns
from headrace.errors import TransportFailed
from headrace.processes import become_child
from headrace.transport.descriptors import DESCRIPTOR_DTYPE, REQUEST
from headrace.transport.pair import RingPair
from headrace.transport.ring import POLL_S, RingClient, RingEndpoint

ANSWER_TIMEOUT_S = 60.0  # the other process may still have to start


def run_echo(job: EchoJob) -> None:
    """Be the other end. The target of a process."""
    become_child()
    answer_all(RingEndpoint(job.ring, lambda _memory: lambda: None))


def answer_all(endpoint: RingEndpoint) -> int:
    """Answer every request at once, in a server's way, until the client closes; return their number."""
    answered = 0
    while (tickets := endpoint.take(POLL_S)) is not None:
        if tickets:
            endpoint.finish(tickets)
            answered += len(tickets)
    endpoint.close()
    return answered


def measure(pair: RingPair) -> RingRates:
    """Return the rates of a ring that an echo answers at the other end, and close it. Raises TransportFailed."""
    client = RingClient(pair)
    try:
        rows = pair.layout.rows
        one = rate(lambda count: exchange(client, count, 1))
        many = rate(lambda count: exchange(client, count, rows))
    finally:
        client.close()
    return RingRates(one_at_a_time_per_s=one, many_at_once_per_s=many, in_flight=rows)


def exchange(client: RingClient, count: int, most: int) -> int:
    """Send so many requests, at most `most` of them unanswered at a time; return the nanoseconds that it took."""
    began = now_ns()
    sent = min(count, most)
    client.send(_requests(np.arange(sent)))
    answered = 0
    while answered < count:
        data = client.take(ANSWER_TIMEOUT_S)
        if not data:
            raise TransportFailed(f"the ring's other end did not answer within {ANSWER_TIMEOUT_S:g} s; measure again")
        free = np.frombuffer(data, DESCRIPTOR_DTYPE)["first_row"]
        answered += len(free)
        again = free[: count - sent]
        if len(again):
            client.send(_requests(again))
            sent += len(again)
    return now_ns() - began


def _requests(rows: np.typing.NDArray[np.integer]) -> bytes:
    """Return a request for each of these rows, of that one row. Nobody leases: each row's last answer has been read."""
    requests = np.zeros(len(rows), DESCRIPTOR_DTYPE)
    requests["kind"] = REQUEST
    requests["first_row"] = rows
    requests["rows"] = 1
    return requests.tobytes()
