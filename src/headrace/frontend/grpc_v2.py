"""A gRPC server on a frontend's event loop: its port, its limits, and whom it lets in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from headrace.errors import InvalidOption
from headrace.frontend.grpc_calls import SERVICE, Calls

if TYPE_CHECKING:
    from headrace.frontend.grpc_calls import Context, Handler
    from headrace.frontend.regions import SharedRegions
    from headrace.frontend.service import Service
    from headrace.frontend.spans import Tracer

HEALTH = tuple(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))  # open to everybody
LARGEST_MESSAGE = 2**31 - 1  # bytes; gRPC counts them in 32 bits
PING_INTERVAL_MS = 5_000  # clients that ping more often than this are cut off; gRPC's default is 5 minutes
KEEPALIVE_MS = 60_000  # after so long without data we ask a client whether it is there
KEEPALIVE_TIMEOUT_MS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM: the server's key and certificates, and whose clients are let in; None: everybody."""

    key: bytes
    certificates: bytes
    client_authority: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """Limits of a front, and whom it lets in."""

    max_message_bytes: int  # each way
    max_concurrent_calls: int = 1024  # beyond it calls are refused with RESOURCE_EXHAUSTED; a stream is one
    tls: TlsFiles | None = None
    authorize: Callable[[str | None], bool] | None = None  # is given the metadata's "authorization"; None: everybody


class GrpcFront:
    """Serves gRPC on an event loop. Several processes may listen on the same port: the kernel divides connections."""

    def __init__(
        self, service: Service, regions: SharedRegions, settings: GrpcSettings, tracer: Tracer | None = None
    ) -> None:
        self._settings = settings
        self._calls = Calls(service, regions, tracer)
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port; 0 takes any. Raises InvalidOption if it cannot."""
        settings = self._settings
        largest = min(settings.max_message_bytes, LARGEST_MESSAGE)
        server = grpc.aio.server(
            interceptors=[_Door(settings.authorize)] if settings.authorize else [],
            maximum_concurrent_rpcs=settings.max_concurrent_calls,
            options=[
                ("grpc.max_receive_message_length", largest),
                ("grpc.max_send_message_length", largest),
                ("grpc.so_reuseport", 1),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
            ],
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, self._calls.handlers())])
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            taken = self._listen(server, address)
        except RuntimeError as error:
            raise InvalidOption(
                f"--grpc-port {port} on {host}: cannot listen there; choose another port or address, or stop what uses"
                " it"
            ) from error
        await server.start()
        self._server = server
        return taken

    async def stop(self, grace_s: float) -> None:
        """Take no more, answer what was taken within the limit, and let go of all connections."""
        self._calls.stop()
        if self._server is not None:
            await self._server.stop(grace_s)

    def _listen(self, server: grpc.aio.Server, address: str) -> int:
        tls = self._settings.tls
        if tls is None:
            return server.add_insecure_port(address)
        credentials = grpc.ssl_server_credentials(
            [(tls.key, tls.certificates)], tls.client_authority, require_client_auth=tls.client_authority is not None
        )
        return server.add_secure_port(address, credentials)


class _Door(grpc.aio.ServerInterceptor):
    """Turns away calls that are not authorized, before their messages are read."""

    def __init__(self, authorize: Callable[[str | None], bool]) -> None:
        self._authorize = authorize
        self._refuse: Handler = grpc.stream_stream_rpc_method_handler(_refuse)  # of any kind of call: none is read

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See `grpc.aio.ServerInterceptor`."""
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get("authorization")
        if handler_call_details.method in HEALTH or self._authorize(given if isinstance(given, str) else None):
            return await continuation(handler_call_details)
        return self._refuse


async def _refuse(_: object, context: Context) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "the call is not authorized; send the metadata 'authorization' that is"
    )
