"""What a frontend's process is given."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.transport.pair import DupFdHolder


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendJob:
    """What a frontend is given. Several may share the socket."""

    name: str  # of the model
    number: int  # which of the frontends it is
    board: DupFdHolder  # the counters' memory
    device: str  # that the backend computes on
    listener: socket.socket
    control: Connection
    max_body_bytes: int
    body_timeout_s: float
    drain_timeout_s: float
