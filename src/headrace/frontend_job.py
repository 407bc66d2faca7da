"""What a frontend's process is given."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.control import RegionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendJob:
    """What a frontend is given. Several may share the socket."""

    name: str  # of the model
    listener: socket.socket
    control: Connection
    max_body_bytes: int
    body_timeout_s: float
    drain_timeout_s: float
    grpc_address: tuple[str, int] | None = None  # on which all frontends listen; None: no gRPC
    system_shared_memory: bool = False  # clients may name regions
    regions: tuple[RegionSpec, ...] = ()  # that clients have registered already
