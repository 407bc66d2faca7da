"""What a frontend's process is given."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.addresses import own_hosts
from headrace.control import RegionSpec
from headrace.transport.pair import DupFdHolder

if TYPE_CHECKING:
    from headrace.serve_config import ServeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Limits of one frontend's HTTP; times in seconds."""

    max_body_bytes: int = 256 << 20  # also of what a compressed body becomes
    body_timeout_s: float = 30.0  # for a body to come, and for an answer to be taken
    header_timeout_s: float = 10.0  # for a head to come
    idle_timeout_s: float = 75.0  # of a connection between requests
    max_connections: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    """Who is let in, over any protocol. None: everybody, in plain text."""

    token_file: Path | None = None  # one bearer token per line
    tls_cert: Path | None = None  # PEM, as are the others
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients must show a certificate that it signed
    hosts: tuple[str, ...] | None = None  # by which HTTP requests may ask for the server; None: by any
    origins: tuple[str, ...] = ()  # whose web pages are let in beside the server's own


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingSettings:
    """Where traces go, and of how many requests."""

    endpoint: str  # base URL of a collector that speaks OTLP over HTTP
    ratio: float  # of requests whose callers do not say whether they are sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendJob:
    """What a frontend is given. Several may share the socket."""

    number: int  # which of the frontends it is
    names: tuple[str, ...]  # of the models
    explicit_control: bool  # clients may load and unload models
    board: DupFdHolder  # the counters' memory
    devices: tuple[str, ...]  # GPUs that backends compute on, as torch calls them or by UUID
    listener: socket.socket
    control: Connection
    http: HttpSettings
    access: AccessSettings
    drain_timeout_s: float
    grpc_address: tuple[str, int] | None = None  # on which all frontends listen; None: no gRPC
    system_shared_memory: bool = False  # clients may name regions
    regions: tuple[RegionSpec, ...] = ()  # that clients have registered already
    tracing: TracingSettings | None = None  # None: no request is traced


def http_settings(config: ServeConfig) -> HttpSettings:
    return HttpSettings(
        max_body_bytes=config.max_body_bytes,
        body_timeout_s=config.body_timeout_s,
        header_timeout_s=config.header_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        max_connections=config.max_connections,
    )


def access_settings(config: ServeConfig) -> AccessSettings:
    return AccessSettings(
        token_file=config.token_file,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        hosts=own_hosts(config.host, config.allow_host or ()),
        origins=config.allow_origin or (),
    )


def tracing_settings(config: ServeConfig) -> TracingSettings | None:
    if config.trace_endpoint is None:
        return None
    return TracingSettings(endpoint=config.trace_endpoint, ratio=config.trace_ratio)
