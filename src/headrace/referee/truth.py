"""What a null server's law gives to each load, as clients that are never late would see it. Pure."""

from __future__ import annotations

import heapq

import numpy as np

from headrace.bench import arrivals
from headrace.clock import NS_PER_S
from headrace.config import LoadConfig
from headrace.referee.cases import TRUTH
from headrace.referee.found import Found, Requests, of_requests
from headrace.target.calibrate import true_response_ns
from headrace.target.law import DRAWS, Law, Queue


def truth(law: Law, load: LoadConfig, samples: int) -> Found:
    """Return what is true of this load. Raises InvalidOption for a file of arrivals that cannot be read."""
    offsets = arrivals.planned(load)
    if offsets is None:
        requests = _closed(law, load, samples)
    else:
        requests = Requests(offsets, offsets + true_response_ns(law, offsets), offsets, samples)
    return of_requests(TRUTH, requests)


def _closed(law: Law, load: LoadConfig, samples: int) -> Requests:
    """Send the next request at the moment of an answer, until the time is up or all are sent."""
    assert load.concurrency is not None
    queue, services = Queue(law), law.service_times_ns()
    end_ns = None if load.duration_s is None else int(load.duration_s * NS_PER_S)
    free = [0] * load.concurrency
    issued: list[int] = []
    completed: list[int] = []
    while end_ns is not None or len(issued) < load.num_iters:
        at_ns = heapq.heappop(free)
        if end_ns is not None and at_ns >= end_ns:
            break
        due_ns = queue.due_ns(at_ns, services[len(issued) % DRAWS])
        issued.append(at_ns)
        completed.append(due_ns)
        heapq.heappush(free, due_ns)
    moments = np.asarray(issued, dtype=np.int64)
    return Requests(moments, np.asarray(completed, dtype=np.int64), moments, samples)
