"""How many requests may be on their way at once, so that the machine survives the published burst.

The published load puts every request at once, and each waits in shared memory of its own: 100 requests of 256 images
are 19 GB. What does not fit waits at the sender, and the run says so.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where Linux keeps shared memory
SHARE_OF_MEMORY = 0.5
SHARE_OF_DESCRIPTORS = 0.25  # each request holds a descriptor in the client, the backend and on the way


def in_flight_limit(
    num_requests: int, request_bytes: int, free_bytes: int, max_descriptors: int
) -> tuple[int, str | None]:
    """Return how many of `num_requests` may be in flight, at least 1, and a note if it is fewer than all."""
    by_memory = int(free_bytes * SHARE_OF_MEMORY // max(1, request_bytes))
    by_descriptors = int(max_descriptors * SHARE_OF_DESCRIPTORS)
    limit = max(1, min(num_requests, by_memory, by_descriptors))
    if limit == num_requests:
        return limit, None
    reason = (
        f"{request_bytes / 1e6:.1f} MB each and {free_bytes / 1e9:.1f} GB of shared memory free"
        if by_memory <= by_descriptors
        else f"{max_descriptors} open files allowed"
    )
    return limit, f"at most {limit} of {num_requests} requests were in flight at once ({reason})"


def free_shared_memory() -> int:
    """Return free bytes of shared memory, no more than the free memory behind it."""
    stat = os.statvfs(SHARED_MEMORY)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(stat.f_bavail * stat.f_frsize, available)


def descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20
