"""What a frontend's process is given."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendJob:
    """What a frontend is given. Several may share the socket."""

    names: tuple[str, ...]  # of the models
    explicit_control: bool  # clients may load and unload models
    listener: socket.socket
    control: Connection
    max_body_bytes: int
    body_timeout_s: float
    drain_timeout_s: float
